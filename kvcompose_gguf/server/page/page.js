"use strict";

const at = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
let messages = [];
let asking = null; // aborts the current request

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function get(path) {
  const answer = await fetch(path, { headers: headers() });
  if (!answer.ok) throw new Error(await told(answer));
  return answer.json();
}

async function told(answer) {
  try { return (await answer.json()).error.message; } catch { return `${answer.status} ${answer.statusText}`; }
}

function show(kind, text) {
  const element = document.createElement("div");
  element.className = kind === "figures" ? kind : `message ${kind}`;
  element.textContent = text;
  at("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

// yields the chunks of server-sent events; a network packet may hold a part of an event or several
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function send(text) {
  const mine = messages; // "New chat" replaces the list
  mine.push({ role: "user", content: text });
  show("user", text);
  const element = show("assistant", "");
  asking = new AbortController();
  at("stop").disabled = false;
  at("send").disabled = true;
  let said = "", thought = "", timings = null, failed = false;
  try {
    const ratio = Number(at("ratio").value);
    const answer = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal: asking.signal,
      body: JSON.stringify({
        messages: mine, stream: true, max_tokens: Number(at("max-tokens").value), temperature: Number(at("temperature").value),
        return_progress: true,
        // a document is continued as it was compressed
        ...(picked().length ? { kv_documents: picked() } : { kv_compress: ratio > 0 ? { ratio } : false }),
      }),
    });
    if (!answer.ok) throw new Error(await told(answer));
    for await (const chunk of events(answer)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const delta = chunk.choices[0]?.delta ?? {}, progress = chunk.prompt_progress;
      said += delta.content ?? "";
      thought += delta.reasoning_content ?? "";
      if (progress) element.textContent = `reading: ${progress.processed} of ${progress.total} tokens, cache ${megabytes(progress.kv_bytes)}`;
      else if (said || thought) element.textContent = said || `(${thought})`;
      timings = chunk.timings ?? timings;
    }
  } catch (error) {
    failed = true;
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (said || !failed) {
    if (!said && !thought) element.textContent = "";
    mine.push({ role: "assistant", content: said });
  } else { mine.pop(); element.remove(); }
  if (timings) show("figures", figures(timings));
  asking = null;
  at("stop").disabled = true;
  at("send").disabled = false;
  await refresh();
}

const picked = () => [...document.querySelectorAll("#documents input:checked")].map((box) => box.value);

async function refreshDocuments() {
  const before = new Set(picked()), { documents } = await get("kv/documents");
  at("documents").replaceChildren(...documents.map((one) => {
    const item = document.createElement("li"), label = document.createElement("label"), box = document.createElement("input");
    const remove = document.createElement("button");
    box.type = "checkbox";
    box.value = one.id;
    box.checked = before.has(one.id);
    label.append(box, ` ${one.title}: ${one.n_tokens} tokens, ${megabytes(one.kv.bytes)} instead of ${megabytes(one.kv.bytes_full)}`);
    remove.type = "button";
    remove.textContent = "Delete";
    remove.setAttribute("aria-label", `Delete ${one.title}`);
    remove.addEventListener("click", () => changed(() => fetch(`kv/documents/${one.id}`, { method: "DELETE", headers: headers() })));
    item.append(label, remove);
    return item;
  }));
}

// asks for a change of the documents, shows what goes wrong, and what there is afterwards
async function changed(ask) {
  at("document-error").hidden = true;
  try {
    const answer = await ask();
    if (!answer.ok) throw new Error(await told(answer));
    for await (const step of events(answer)) {
      if (step.error) throw new Error(step.error.message);
      const progress = step.prompt_progress;
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

async function readDocument(file) {
  const text = await file.text(), ratio = Number(at("ratio").value);
  at("read").value = 0;
  at("reading-text").textContent = file.name;
  at("reading").hidden = false;
  await changed(() => fetch("kv/documents", {
    method: "POST", headers: headers(),
    body: JSON.stringify({ text, title: file.name, stream: true, kv_compress: ratio > 0 ? { ratio } : null }),
  }));
  at("reading").hidden = true;
}

function figures(t) {
  const parts = [`${t.prompt_n} prompt tokens read in ${(t.prompt_ms / 1000).toFixed(1)} s, ${t.cache_n} from the cache`];
  if (t.predicted_per_second) parts.push(`${t.predicted_per_second.toFixed(1)} tokens/s`);
  return parts.join("; ");
}

async function refresh() {
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
    const whole = document.createElement("div"), part = document.createElement("div");
    part.style.height = `${100 * n / kv.n_tokens}%`;
    whole.title = `layer ${layer}: ${n} of ${kv.n_tokens} tokens`;
    whole.append(part);
    at("layers").append(whole);
  });
  const { pieces, shares } = await get(`kv/slots/${slot.id}`);
  pieces.forEach((piece, i) => {
    const element = document.createElement("span");
    element.textContent = piece;
    element.title = `kept by ${(100 * shares[i]).toFixed(0)} % of the attention heads`;
    element.style.backgroundColor = `rgba(var(--keep), ${(0.75 * shares[i]).toFixed(3)})`;
    at("kept").append(element);
  });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || asking) return;
  at("text").value = "";
  send(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("stop").addEventListener("click", () => asking?.abort());
at("clear").addEventListener("click", () => { asking?.abort(); messages = []; at("messages").replaceChildren(); });
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  if (file) at("text").value = `${await file.text()}\n\n${at("text").value}`;
  at("file").value = "";
});
at("document").addEventListener("change", async () => {
  const [file] = at("document").files;
  at("document").value = "";
  if (file) await readDocument(file);
});
const showRatio = () => { at("ratio-text").value = ` ${Math.round(100 * at("ratio").value)} %`; };
at("ratio").addEventListener("input", showRatio);
at("key").addEventListener("change", start);

async function start() {
  showRatio();
  try {
    const [model] = (await get("v1/models")).data;
    at("model").textContent = `${model.id.split("/").pop()}, ${model.meta.n_ctx} tokens`;
    await refresh();
    await refreshDocuments();
  } catch (error) {
    at("model").textContent = error.message;
    if (error.message === "Loading model") setTimeout(start, 500);
  }
}
start();
