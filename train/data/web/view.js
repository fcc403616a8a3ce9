// One pair at a time: picture, caption, mentions, and whether it is struck.
const token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
const at = (id) => document.getElementById(id);
let total = 0;
let number = 0;
let struck = false;
let shown = 0;

async function call(path, body) {
  const headers = { authorization: `Bearer ${token}` };
  const options = body ? { method: "POST", body: JSON.stringify(body), headers: { ...headers, "content-type": "application/json" } } : { headers };
  const reply = await fetch(path, options);
  if (!reply.ok) {
    const told = await reply.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${reply.status}`);
  }
  return reply;
}

function guarded(work) {
  return async (...given) => {
    try {
      await work(...given);
      at("error").hidden = true;
    } catch (error) {
      at("error").textContent = error.message;
      at("error").hidden = false;
    }
  };
}

function tell(about) {
  total = about.pairs;
  at("number").max = total;
  at("count").textContent = `${number + 1} of ${total}, ${about.struck} struck`;
}

const show = guarded(async (wanted) => {
  const next = Math.min(Math.max(wanted, 0), total - 1);
  const turn = ++shown;
  const [pair, picture, about] = await Promise.all([
    call(`/api/pairs/${next}`).then((reply) => reply.json()),
    call(`/api/pairs/${next}/picture`).then((reply) => reply.blob()),
    call("/api/about").then((reply) => reply.json()),
  ]);
  if (turn !== shown) return; // the reader is further on already
  number = next;
  URL.revokeObjectURL(at("picture").src);
  at("picture").src = URL.createObjectURL(picture);
  at("picture").alt = pair.label || pair.figure;
  at("title").textContent = pair.title;
  at("origin").textContent = [pair.label, pair.part, pair.language, pair.licence, pair.journal, pair.date, pair.doi].filter(Boolean).join(" · ");
  at("caption").textContent = pair.caption;
  at("caption").lang = pair.language;
  at("mentions").replaceChildren(...pair.mentions.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  at("number").value = number + 1;
  at("reason").value = pair.reason;
  mark(pair.struck);
  tell(about);
});

function mark(value) {
  struck = value;
  document.body.classList.toggle("struck", struck);
  at("strike").textContent = struck ? "Take back (s)" : "Strike (s)";
  at("strike").setAttribute("aria-pressed", String(struck));
}

const toggle = guarded(async () => {
  const reply = await call(`/api/pairs/${number}/strike`, { struck: !struck, reason: at("reason").value });
  mark(!struck);
  tell(await reply.json());
});

at("previous").addEventListener("click", () => show(number - 1));
at("next").addEventListener("click", () => show(number + 1));
at("number").addEventListener("change", () => show(Number(at("number").value) - 1));
at("judge").addEventListener("submit", (event) => {
  event.preventDefault();
  toggle();
});
document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowRight") show(number + 1);
  if (event.key === "ArrowLeft") show(number - 1);
  if (event.key === "s") toggle();
});
guarded(async () => {
  tell(await (await call("/api/about")).json());
  await show(0);
})();
