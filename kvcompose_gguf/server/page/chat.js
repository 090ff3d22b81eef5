// The conversation: its messages, the texts that are attached to the next one, and the answer while it comes.

import { refreshCache } from "./cache.js";
import { picked } from "./documents.js";
import { at, events, made, megabytes, onFiles, post } from "./shared.js";

const N_FOLD = 1500; // characters of a text that is shown folded
const RENDER_MS = 500; // between two forms of an answer that is still being written

let messages = [];
let attached = []; // {name, text}
let asking = null; // aborts the current request

//
// messages
//

function show(element) {
  at("messages").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

const sizeOf = (text) => `${text.length.toLocaleString("en")} characters`;

function userMessage(text) {
  if (text.length < N_FOLD) return made("div", { className: "message user", textContent: text });
  const summary = made("summary", { textContent: `${text.trim().slice(0, 80)} … (${sizeOf(text)})` });
  return made("details", { className: "message user" }, summary, text);
}

function figures(t) {
  const parts = [`${t.prompt_n} prompt tokens read in ${(t.prompt_ms / 1000).toFixed(1)} s, ${t.cache_n} from the cache`];
  if (t.predicted_per_second) parts.push(`${t.predicted_per_second.toFixed(1)} tokens/s`);
  return parts.join("; ");
}

// An answer on the page. Its text is there at once; its form as Markdown follows.
class Answer {
  said = "";
  thought = "";
  #element = show(made("div", { className: "message assistant", ariaBusy: "true" }));
  #answer = made("div");
  #thoughts = made("details", { open: true }, made("summary", { textContent: "Thoughts" }), made("div"));
  #later = null; // the timer of the next form
  #rendering = Promise.resolve();

  constructor() { this.#element.append(this.#answer); }

  reading(progress) {
    this.#answer.textContent = `reading: ${progress.processed} of ${progress.total} tokens, cache ${megabytes(progress.kv_bytes)}`;
  }

  add(said, thought) {
    if (!said && !thought) return;
    if (!this.said && !this.thought) this.#answer.textContent = "";
    this.said += said;
    this.thought += thought;
    if (thought) {
      if (!this.#thoughts.isConnected) this.#element.prepend(this.#thoughts);
      this.#thoughts.lastChild.textContent = this.thought;
    }
    if (!said) return;
    if (!this.#answer.classList.contains("markdown")) this.#answer.textContent = this.said;
    this.#later ??= setTimeout(() => this.#render(), RENDER_MS);
  }

  #render() {
    clearTimeout(this.#later);
    this.#later = null;
    this.#rendering = this.#rendering.then(async () => {
      try {
        this.#answer.innerHTML = (await (await post("kv/markdown", { text: this.said })).json()).html; // without HTML of the text
        this.#answer.classList.add("markdown");
        for (const link of this.#answer.querySelectorAll("a")) link.target = "_blank"; // the chat stays
      } catch {
        this.#answer.textContent = this.said;
      }
    });
  }

  async end() {
    this.#thoughts.open = false;
    if (this.said) this.#render();
    else this.#answer.textContent = "";
    await this.#rendering;
    this.#element.ariaBusy = "false";
  }

  remove() { this.#element.remove(); }
}

//
// asking
//

async function send(question) {
  const mine = messages, texts = attached; // "New chat" replaces the list
  const content = [...texts.map((one) => one.text), question].filter(Boolean).join("\n\n");
  mine.push({ role: "user", content });
  attach([]);
  const asked = show(userMessage(content)), answer = new Answer();
  asking = new AbortController();
  at("stop").disabled = false;
  at("send").disabled = true;
  let timings = null, failure = null;
  try {
    const ratio = Number(at("ratio").value), documents = picked();
    const chunks = events(await post("v1/chat/completions", {
      messages: mine, stream: true, max_tokens: Number(at("max-tokens").value), temperature: Number(at("temperature").value),
      return_progress: true,
      // a document is continued as it was compressed
      ...(documents.length ? { kv_documents: documents } : { kv_compress: ratio > 0 ? { ratio } : false }),
    }, asking.signal));
    for await (const chunk of chunks) {
      const delta = chunk.choices[0]?.delta ?? {};
      if (chunk.prompt_progress) answer.reading(chunk.prompt_progress);
      answer.add(delta.content ?? "", delta.reasoning_content ?? "");
      timings = chunk.timings ?? timings;
    }
  } catch (error) {
    failure = error;
  }
  await answer.end();
  if (answer.said || !failure) {
    mine.push({ role: "assistant", content: answer.said });
  } else { // the question goes back to where it was written
    mine.pop();
    answer.remove();
    if (mine === messages && !at("text").value && !attached.length) {
      asked.remove();
      at("text").value = question;
      attach(texts);
    }
  }
  if (mine === messages) {
    if (failure && failure.name !== "AbortError") show(made("div", { className: "message error", role: "alert", textContent: failure.message }));
    if (timings) show(made("div", { className: "figures", textContent: figures(timings) }));
  }
  asking = null;
  at("stop").disabled = true;
  at("send").disabled = false;
  await refreshCache();
}

//
// attached texts
//

function attach(texts) {
  attached = texts;
  at("attached").replaceChildren(...attached.map((one) => {
    const summary = made("summary", { textContent: `${one.name}, ${sizeOf(one.text)}` });
    const remove = made("button", { type: "button", textContent: "Remove", ariaLabel: `Remove ${one.name}` });
    remove.addEventListener("click", () => attach(attached.filter((other) => other !== one)));
    return made("li", {}, made("details", {}, summary, made("div", { textContent: one.text })), remove);
  }));
}

async function attachFiles(files) {
  attach([...attached, ...await Promise.all(files.map(async (file) => ({ name: file.name, text: await file.text() })))]);
}

at("text").addEventListener("paste", (event) => {
  const text = event.clipboardData.getData("text");
  if (text.length < N_FOLD) return;
  event.preventDefault();
  attach([...attached, { name: "Pasted text", text }]);
});
onFiles(at("file"), document.querySelector("main"), attachFiles);

//
// buttons
//

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = at("text").value.trim();
  if ((!question && !attached.length) || asking) return;
  at("text").value = "";
  send(question);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
at("stop").addEventListener("click", () => asking?.abort());
at("clear").addEventListener("click", () => { asking?.abort(); messages = []; at("messages").replaceChildren(); });
