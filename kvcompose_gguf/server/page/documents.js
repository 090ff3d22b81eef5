// The shelf: documents that are read once, and that a chat begins with.

import { ask, at, events, get, made, megabytes, onFiles, post } from "./shared.js";

export const picked = () => [...document.querySelectorAll("#documents input:checked")].map((box) => box.value);

export async function refreshDocuments() {
  const before = new Set(picked()), { documents } = await get("kv/documents");
  at("documents").replaceChildren(...documents.map((one) => {
    const box = made("input", { type: "checkbox", value: one.id, checked: before.has(one.id) });
    const size = `${one.n_tokens} tokens, ${megabytes(one.kv.bytes)} instead of ${megabytes(one.kv.bytes_full)}`;
    const remove = made("button", { type: "button", textContent: "Delete", ariaLabel: `Delete ${one.title}` });
    remove.addEventListener("click", () => changed(() => ask(`kv/documents/${one.id}`, { method: "DELETE" })));
    return made("li", {}, made("label", {}, box, ` ${one.title}: ${size}`), remove);
  }));
}

// Makes a change, tells its progress and what goes wrong, and shows what there is afterwards.
async function changed(change) {
  at("document-error").hidden = true;
  try {
    for await (const { prompt_progress: progress } of events(await change())) {
      if (!progress) continue;
      at("read").value = progress.processed / progress.total;
      at("reading-text").textContent = `${progress.step}: ${progress.processed} of ${progress.total} tokens, ${megabytes(progress.kv_bytes)}`;
    }
  } catch (error) {
    at("document-error").textContent = error.message;
    at("document-error").hidden = false;
  }
  await refreshDocuments();
}

const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => resolve(reader.result));
  reader.addEventListener("error", () => reject(reader.error));
  reader.readAsDataURL(file);
});

async function readDocuments(files) {
  const ratio = Number(at("ratio").value);
  for (const file of files) {
    at("read").value = 0;
    at("reading-text").textContent = file.name;
    at("reading").hidden = false;
    await changed(async () => post("kv/documents", {
      file: { filename: file.name, file_data: await dataUrl(file) }, stream: true, kv_compress: ratio > 0 ? { ratio } : null,
    }));
    at("reading").hidden = true;
  }
}

onFiles(at("document"), document.querySelector("aside"), readDocuments);
