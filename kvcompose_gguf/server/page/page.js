// The page of the server: a chat, the documents that it can begin with, and what the cache holds.

import { refreshCache } from "./cache.js";
import "./chat.js";
import { refreshDocuments } from "./documents.js";
import { at, get } from "./shared.js";

const showRatio = () => { at("ratio-text").value = ` ${Math.round(100 * at("ratio").value)} %`; };

async function start() {
  showRatio();
  try {
    const [model] = (await get("v1/models")).data;
    at("model").textContent = `${model.id.split("/").pop()}, ${model.meta.n_ctx} tokens`;
    await refreshCache();
    await refreshDocuments();
  } catch (error) {
    at("model").textContent = error.message;
    if (error.message === "Loading model") setTimeout(start, 500);
  }
}

at("ratio").addEventListener("input", showRatio);
at("key").addEventListener("change", start);
start();
