// What every part of the page needs: elements, requests to the server, and files that the user gives.

export const at = (id) => document.getElementById(id);
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

export function made(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// Every answer comes from here; one that is no success is an error with the server's sentence.
export async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (!answer.ok) throw new Error(await told(answer));
  return answer;
}

export const get = async (path) => (await ask(path)).json();

export const post = (path, body, signal) => ask(path, { method: "POST", body: JSON.stringify(body), signal });

async function told(answer) {
  try { return (await answer.json()).error.message; } catch { return `${answer.status} ${answer.statusText}`; }
}

// Yields the chunks of server-sent events; a network packet may hold a part of an event, or several. A chunk that tells
// of an error is one.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// Gives the files to take that are chosen with an input, or dropped on an area.
export function onFiles(input, area, take) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    take(files);
  });
  area.addEventListener("dragover", (event) => { event.preventDefault(); area.classList.add("drop"); });
  area.addEventListener("dragleave", () => area.classList.remove("drop"));
  area.addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("drop");
    take([...event.dataTransfer.files]);
  });
}
