// The page: conversations, questions, answers as they are written.

import { events, get, picture, post, send, setToken, takeToken } from "./api.js";
import { element, render } from "./markdown.js";
import { LANGUAGES, choose, number, preferred, t } from "./strings.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer(showHint, () => readAhead().catch(fail), fail, askAboutText);
let model = null;
let conversation = null; // its name
let transcript = null;
let keepPictures = false; // of a branched question, which wait on the server
let busy = false;
let pause = 0; // a timer: when it ends, so did the typing
const PAUSE_MS = 300;

async function start() {
  for (const [code, name] of Object.entries(LANGUAGES)) $("language").append(new Option(name, code));
  $("language").value = preferred();
  choose($("language").value);
  viewer.show(null);
  takeToken();
  listen();
  for (;;) {
    try {
      model = await get("/api/model");
      break;
    } catch (error) {
      if (error.status !== 401) return fail(error);
      setToken(await askForToken());
    }
  }
  const listed = await get("/api/conversations");
  await open(listed[0]?.name ?? null);
}

function askForToken() {
  $("door").showModal();
  return new Promise((entered) => $("door").addEventListener("close", () => entered($("token").value), { once: true }));
}

function askAboutText(count) {
  $("text-found").textContent = t("textFound", count);
  $("worded").returnValue = "";
  $("worded").showModal();
  return new Promise((chosen) => {
    $("worded").addEventListener("close", () => chosen($("worded").returnValue), { once: true });
  });
}

async function open(name) {
  conversation = name;
  keepPictures = false;
  transcript = name && (await get(`/api/conversations/${name}`));
  say("");
  showTalk();
  await showList();
  if (name) post(`/api/conversations/${name}/read`).catch(fail); // so that it goes on at once
}

async function ask(question) {
  if (busy || !question.trim()) return;
  conversation ??= (await post("/api/conversations")).name;
  const pictures = viewer.unseen();
  const json = { question, pictures: keepPictures && !pictures.length ? null : pictures };
  $("question").value = "";
  if (!(await follow(`/api/conversations/${conversation}/ask`, json, question))) $("question").value = question;
  else if (pictures.length) viewer.markSent();
}

// The model reads the pictures while the question is typed, so that the answer starts at once.
async function readAhead() {
  const pictures = viewer.unseen();
  if (busy || !pictures.length) return;
  conversation ??= (await post("/api/conversations")).name;
  await post(`/api/conversations/${conversation}/read`, { pictures });
}

// And what is typed so far, whenever the typing pauses.
function readTyped() {
  clearTimeout(pause);
  pause = setTimeout(() => {
    const question = $("question").value;
    if (!busy && conversation && question.trim()) post(`/api/conversations/${conversation}/read`, { question }).catch(fail);
  }, PAUSE_MS);
}

async function again() {
  await follow(`/api/conversations/${conversation}/again`, {}, transcript.turns.at(-1).question, true);
}

// Show an answer as it is written; true when it is in the conversation.
async function follow(path, json, question, instead = false) {
  setBusy(true);
  const log = $("log");
  if (instead) log.lastElementChild.remove();
  const body = element("div");
  body.className = "answer";
  body.setAttribute("aria-busy", "true");
  const turn = element("article", asked(question, element("span")), body);
  log.append(turn);
  toEnd();
  const clock = showStage("waiting");
  let text = "", kept = false, painted = 0;
  const paint = () => {
    painted = 0;
    const follows = turn.getBoundingClientRect().bottom < innerHeight;
    body.replaceChildren(render(text));
    if (follows) toEnd();
  };
  try {
    for await (const event of events(path, json)) {
      if (event.stage) clock.stage(event.stage);
      if (event.error) throw new Error(event.error);
      if (event.done !== undefined) kept = event.done;
      if (event.text) {
        if (!text) clock.stage("writing");
        text += event.text;
        painted ||= requestAnimationFrame(paint);
      }
    }
    clock.end();
    if (!kept) say(t("noAnswer"));
    else say(t(await settle() === "stopped" ? "stopped" : "done"));
  } catch (error) {
    clock.end();
    fail(error);
  }
  cancelAnimationFrame(painted);
  setBusy(false);
  if (conversation) transcript = await get(`/api/conversations/${conversation}`).catch(() => transcript);
  showTalk();
  await showList().catch(fail);
  $("question").focus({ preventScroll: true });
  return kept;
}

async function settle() {
  transcript = await get(`/api/conversations/${conversation}`);
  keepPictures = false;
  return transcript.turns.at(-1)?.finish;
}

function showStage(name) {
  const began = performance.now();
  const clock = { stage: (next) => ((name = next), tell()), end: () => clearInterval(timer) };
  const tell = () => say(`${t(name)}… ${number((performance.now() - began) / 1000, 0)} s`);
  const timer = setInterval(tell, 1000);
  tell();
  return clock;
}

function showTalk() {
  const turns = transcript?.turns ?? [];
  $("log").replaceChildren(...turns.map((turn, i) => {
    const pictures = element("span", ...turn.images.map((_, k) => seen(i, k)));
    const body = element("div", render(turn.answer));
    body.className = "answer";
    return element("article", asked(turn.question, pictures), body, ...unknown(turn), facts(turn), buttons(turn, i, turns.length));
  }));
  toEnd();
  for (const id of ["export-json", "export-sr", "export-pdf", "forget"]) $(id).disabled = !turns.length;
  showHint();
  showModel();
}

function toEnd() {
  $("log").lastElementChild?.scrollIntoView({ block: "end" });
}

function asked(question, pictures) {
  const text = element("p", question);
  const made = element("div", pictures, text);
  made.className = "question";
  made.setAttribute("aria-label", t("you"));
  return made;
}

function seen(exchange, k) {
  const image = new Image();
  image.alt = t("modelSees");
  image.title = t("modelSees");
  const path = `/api/conversations/${conversation}/seen/${exchange}/${k}`;
  picture(path).then(({ url }) => (image.src = url), fail);
  return image;
}

function unknown(turn) {
  if (!turn.cannot_be_told) return [];
  const made = element("p", t("cannotBeTold"));
  made.className = "unknown";
  return [made];
}

// What an answer rests on.
function facts(turn) {
  const { sampling, timings } = turn;
  const told = [
    [model.name, model.type, model.runtime].filter(Boolean).join(" "),
    ...turn.images.map((image) => [image.modality ?? image.format,
      image.window ? t("window", number(image.window[0]), number(image.window[1])) : null,
      image.frames > 1 ? t("frame", image.frame + 1, image.frames) : null,
      `SHA-256 ${image.seen_sha256.slice(0, 12)}…`].filter(Boolean).join(", ")),
    t("seed", sampling.seed, number(sampling.temperature, 2)),
    t("timing", number(timings.ttft_ms / 1000, 2), number(timings.decode_tokens / (timings.decode_ms / 1000 || 1))),
  ];
  told.splice(1, 0, ...evidence());
  if (model.unreleased) told.unshift(t("unreleased", model.unreleased));
  if (turn.finish !== "end") told.unshift(t(turn.finish === "stopped" ? "finishStopped" : "finishLength"));
  const sure = element("span", turn.how_sure ? howSure(turn.how_sure) : "");
  sure.className = "sure";
  const made = element("p", sure, told.join(" · "), element("br"), t("notice"));
  made.className = "facts";
  made.title = turn.images.map((image) => image.seen_sha256).join(" ");
  return made;
}

/** How often answers of such a probability were right, where it was measured. */
function howSure({ probability, right, ci_low, ci_high, answers, dataset }) {
  const percent = (share) => `${number(share * 100, 0)} %`;
  return t("howSure", percent(probability), answers, percent(right), percent(ci_low), percent(ci_high), dataset);
}

/** What the export lost, as far as it was measured. */
function evidence() {
  const told = [];
  if (model.fidelity) {
    const { top1_agreement, mean_kld, tokens } = model.fidelity;
    told.push(t("fidelity", `${number(top1_agreement * 100)} %`, mean_kld.toPrecision(2), tokens));
  }
  if (model.verdict?.released) {
    const { loss, loss_high, max_loss, questions } = model.verdict;
    told.push(t("released", number(loss, 1), number(loss_high, 1), number(max_loss, 1), questions));
  }
  return told;
}

function buttons(turn, i, count) {
  const made = element("p");
  made.className = "buttons";
  const add = (name, does) => {
    const button = element("button", t(name));
    button.className = "quiet";
    button.addEventListener("click", () => Promise.resolve(does(button)).catch(fail));
    made.append(button);
  };
  add("copy", async (button) => {
    await navigator.clipboard.writeText(turn.answer);
    button.textContent = t("copied");
  });
  if (i === count - 1) add("again", again);
  add("edit", async () => {
    if (busy) return;
    const { name } = await post(`/api/conversations/${conversation}/branch`, { exchange: i });
    await open(name);
    keepPictures = turn.images.length > 0;
    if (keepPictures) viewer.clear();
    $("question").value = turn.question;
    $("question").focus();
    showHint();
  });
  return made;
}

async function showList() {
  const listed = await get("/api/conversations");
  $("conversations").replaceChildren(...listed.map(({ name, title }) => {
    const button = element("button", title);
    if (name === conversation) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      if (busy) return;
      viewer.clear();
      open(name).catch(fail);
    });
    return element("li", button);
  }));
}

function showModel() {
  if (!model) return;
  document.title = `${model.name} · ldrt-edge`;
  $("model-name").textContent = model.name;
  $("written").dataset.t = model.history ? "writtenEncrypted" : "nothingWritten";
  $("written").textContent = t($("written").dataset.t);
  $("model-facts").textContent = [model.type, model.runtime, ...evidence()].filter(Boolean).join(" · ");
  $("unreleased").textContent = model.unreleased ? t("unreleased", model.unreleased) : "";
}

function showHint() {
  const unseen = viewer.unseen().length;
  const held = transcript?.turns.some((turn) => turn.images.length) || keepPictures;
  $("hint").textContent = unseen ? t("willShow", unseen) : held ? t("hasSeen") : t("noPicture");
}

function setBusy(on) {
  busy = on;
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function fail(error) {
  say(error.message, true);
}

async function add(files) {
  await viewer.add(files, (i, count) => say(t("uploading", i, count)));
  if (!$("status").classList.contains("wrong")) say("");
}

// The files of what was dropped, folders walked through.
async function dropped(items) {
  const found = [];
  const walk = async (entry) => {
    if (entry.isFile) return found.push(await new Promise((take, refuse) => entry.file(take, refuse)));
    const reader = entry.createReader();
    for (let more; (more = await new Promise((take, refuse) => reader.readEntries(take, refuse))).length; ) {
      for (const inner of more) await walk(inner);
    }
  };
  // all entries first: the items are gone after the first wait
  for (const [entry, file] of items.map((item) => [item.webkitGetAsEntry(), item.getAsFile()])) {
    if (entry) await walk(entry);
    else if (file) found.push(file);
  }
  return found;
}

function save(blob, ending) {
  const url = URL.createObjectURL(blob);
  const link = element("a");
  link.href = url;
  link.download = `ldrt-edge-conversation.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function listen() {
  const doing = (work) => (...given) => Promise.resolve(work(...given)).catch(fail);
  $("composer").addEventListener("submit", doing((event) => {
    event.preventDefault();
    return ask($("question").value);
  }));
  $("question").addEventListener("input", readTyped);
  $("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  const stop = doing(() => busy && post(`/api/conversations/${conversation}/stop`));
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => event.key === "Escape" && busy && stop());
  $("file").addEventListener("change", doing(async (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // at once, so that whoever picks the same file while this one is read is heard
    await add(files);
  }));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
  document.addEventListener("dragleave", () => $("stage").classList.remove("over"));
  document.addEventListener("drop", doing(async (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
    const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
    if (items.length) await add(await dropped(items));
  }));
  document.addEventListener("paste", doing((event) => {
    if (event.clipboardData.files.length) return add(event.clipboardData.files);
  }));
  $("new").addEventListener("click", doing(async () => {
    if (busy) return;
    viewer.clear();
    await open(null);
    $("question").focus();
  }));
  $("forget").addEventListener("click", doing(async () => {
    if (busy) return;
    await send("DELETE", `/api/conversations/${conversation}`);
    viewer.clear();
    await open(null);
  }));
  $("export-json").addEventListener("click", () => {
    save(new Blob([JSON.stringify(transcript, null, 1)], { type: "application/json" }), "json");
  });
  $("export-sr").addEventListener("click", doing(async () => {
    save(await (await send("GET", `/api/conversations/${conversation}/report`)).blob(), "dcm");
  }));
  $("export-pdf").addEventListener("click", () => window.print());
  $("menu").addEventListener("click", () => {
    $("menu").setAttribute("aria-expanded", document.body.classList.toggle("listed"));
  });
  $("language").addEventListener("change", (event) => {
    choose(event.target.value);
    if (!busy) {
      say("");
      showTalk();
    }
    viewer.show(viewer.current);
  });
  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}

start().catch(fail);
