// What the cache holds: the rows of each layer, and how many heads keep each token.

import { at, get, made, megabytes } from "./shared.js";

export async function refreshCache() {
  let slots;
  try { slots = await get("kv/slots"); } catch (error) { at("summary").textContent = error.message; return; }
  const slot = slots.find((one) => one.kv);
  at("layers").replaceChildren();
  at("kept").replaceChildren();
  if (!slot) {
    at("summary").textContent = "Nothing is compressed. Prompts of at least 256 tokens will be.";
    return;
  }
  const kv = slot.kv;
  at("summary").textContent = `Slot ${slot.id}: ${kv.n_tokens} tokens, ${(100 * kv.ratio).toFixed(0)} % of their cache removed. ` +
    `${megabytes(kv.bytes)} instead of ${megabytes(kv.bytes_full)}, ${megabytes(slot.kv_bytes)} allocated` +
    (slot.kv_bytes_ceiling ? `, never more than ${megabytes(slot.kv_bytes_ceiling)}` : "") +
    `. Scoring took ${(kv.score_ms / 1000).toFixed(2)} s.`;
  kv.n_kept.forEach((n, layer) => {
    const part = made("div");
    part.style.height = `${100 * n / kv.n_tokens}%`;
    at("layers").append(made("div", { title: `layer ${layer}: ${n} of ${kv.n_tokens} tokens` }, part));
  });
  const { pieces, shares } = await get(`kv/slots/${slot.id}`);
  pieces.forEach((piece, i) => {
    const title = `kept by ${(100 * shares[i]).toFixed(0)} % of the attention heads`;
    const element = made("span", { textContent: piece, title });
    element.style.backgroundColor = `rgba(var(--keep), ${(0.75 * shares[i]).toFixed(3)})`;
    at("kept").append(element);
  });
}
