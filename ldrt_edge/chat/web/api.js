// Requests to the server of this page; the token of this start goes along as a header, never as a cookie.

const KEPT = "ldrt-edge-token";
let token = "";

// Take the token out of the address, so that neither the history nor a copied address holds it.
export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname);
  setToken(given ?? sessionStorage.getItem(KEPT) ?? "");
}

export function setToken(value) {
  token = value.trim();
  sessionStorage.setItem(KEPT, token); // this tab's only, for a reload
}

// keepalive: it goes out though the page is left, if all that go so have 64 KiB of bodies at most.
export async function send(method, path, { json, body, signal, keepalive } = {}) {
  const headers = { authorization: `Bearer ${token}` };
  if (json !== undefined) headers["content-type"] = "application/json";
  const content = json === undefined ? body : JSON.stringify(json);
  const reply = await fetch(path, { method, headers, body: content, signal, keepalive, credentials: "omit" });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw Object.assign(new Error(told?.error?.message ?? `${reply.status}`), { status: reply.status });
}

export async function get(path) {
  return (await send("GET", path)).json();
}

export async function post(path, json = {}) {
  return (await send("POST", path, { json })).json();
}

// A picture as an object URL, and what the server says about it.
export async function picture(path, signal) {
  const reply = await send("GET", path, { signal });
  return { url: URL.createObjectURL(await reply.blob()), about: JSON.parse(reply.headers.get("x-picture")) };
}

// The events of an answer as they are written, one JSON object a line.
export async function* events(path, json) {
  const reply = await send("POST", path, { json });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}
