// The page: conversations, questions, answers as they are written.

import { events, get, picture, post, send, setToken, takeToken } from "./api.js";
import { evidence, facts } from "./facts.js";
import { dropped, save } from "./files.js";
import { element, render } from "./markdown.js";
import { sight } from "./slots.js";
import { LANGUAGES, choose, number, preferred, t } from "./strings.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const viewer = new Viewer(showHint, () => readAhead().catch(fail), fail, askAboutText);
let model = null;
let here = talk(); // the conversation on the page; a late reply to another one finds that it is not
let asking = Promise.resolve(); // about text, one question at a time
let busy = false;
let stopped = false; // before there was an answer to stop
let pause = 0; // a timer: when it ends, so did the typing
const PAUSE_MS = 300;
const MOST_TEXT_VIEWS = 4;

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
  await open(talk(listed[0]?.name));
}

function askForToken() {
  $("door").showModal();
  return new Promise((entered) => $("door").addEventListener("close", () => entered($("token").value), { once: true }));
}

// "show", "blackOut" where text was found, or "" to leave the frames out.
function askAboutText(frames, found) {
  asking = asking.then(async () => {
    $("text-found").textContent = t(found ? "textFound" : "textMissed", frames.length);
    $("black-out").hidden = $("text-note").hidden = !found;
    const views = frames.slice(0, MOST_TEXT_VIEWS).map((one) => drawn(sight(one), "picture"));
    $("text-views").replaceChildren(...views);
    $("worded").returnValue = "";
    $("worded").showModal();
    await new Promise((closed) => $("worded").addEventListener("close", closed, { once: true }));
    $("text-views").replaceChildren();
    return $("worded").returnValue;
  });
  return asking;
}

// naming: its name on the server, as soon as it is open there. asked: it has turns of its own, besides those inherited
// from where it branched off; else it goes when it is left, since nobody would look for it. waiting: pictures of a
// branched question, which wait there. shown: the pictures that went with each turn, as far as this page showed them.
function talk(name = null) {
  const naming = name && Promise.resolve(name), transcript = { turns: [] };
  return { name, naming, asked: Boolean(name), inherited: 0, transcript, waiting: 0, shown: [] };
}

async function open(opened) {
  clearTimeout(pause);
  const left = leave(here);
  here = opened;
  say("");
  showTalk();
  if (opened.name) await refresh(opened);
  await left; // the list has it no more
  if (busy || opened !== here) return;
  showTalk();
  await showList();
  await readAhead(); // so that it goes on at once
}

// Open a conversation on the server when something is to go there: once, however many want it.
function named(talk) {
  talk.naming ??= post("/api/conversations").then(({ name }) => (talk.name = name), (error) => {
    talk.naming = null;
    throw error;
  });
  return talk.naming;
}

async function refresh(talk) {
  const { waiting, ...transcript } = await get(`/api/conversations/${talk.name}`);
  Object.assign(talk, { waiting, transcript, asked: transcript.turns.length > talk.inherited });
}

async function leave(talk, keepalive = false) {
  if (!talk.asked) await drop(talk, keepalive).catch(fail);
}

async function drop(talk, keepalive = false) {
  if (!talk.naming) return;
  await send("DELETE", `/api/conversations/${await talk.naming}`, { keepalive }).catch(unless(404));
  talk.naming = null;
}

async function ask(question) {
  if (busy || !question.trim()) return;
  clearTimeout(pause);
  setBusy(true);
  try {
    await named(here);
    await viewer.look();
  } catch (error) {
    setBusy(false);
    throw error;
  }
  if (stopped) {
    setBusy(false);
    $("question").focus();
    return say(t("stopped"));
  }
  const pictures = unseen(), before = here.transcript.turns.length;
  $("question").value = "";
  here.asked = true;
  await follow(`/api/conversations/${here.name}/ask`, { question, pictures }, question);
  if (here.transcript.turns.length > before) here.shown[before] = pictures;
  else $("question").value ||= question;
  await rest();
}

function stop() {
  stopped = busy;
  if (busy && here.name) return post(`/api/conversations/${here.name}/stop`);
}

function unseen() {
  return viewer.unseen(here.shown.flat());
}

// The model reads pictures and what is typed so far, so that the answer starts at once; and no longer what is neither.
async function readAhead() {
  clearTimeout(pause);
  const mine = here;
  await viewer.look();
  const pictures = unseen(), question = $("question").value;
  if (busy || mine !== here || !(mine.naming || pictures.length)) return;
  const name = await named(mine);
  showHint();
  if (busy || mine !== here) return;
  const json = { ...(pictures.length && { pictures }), ...(question.trim() && { question }) };
  await post(`/api/conversations/${name}/read`, json).catch(unless(404, 409)); // it was forgotten or asked meanwhile
}

function readTyped() {
  clearTimeout(pause);
  pause = setTimeout(() => readAhead().catch(fail), PAUSE_MS);
}

async function again() {
  if (busy) return;
  clearTimeout(pause);
  await follow(`/api/conversations/${here.name}/again`, {}, here.transcript.turns.at(-1).question, true);
  await rest();
}

async function forget() {
  if (busy) return;
  clearTimeout(pause);
  setBusy(true);
  await drop(here).finally(() => setBusy(false));
  $("question").value = "";
  viewer.clear();
  await open(talk());
  $("question").focus();
}

// Show an answer as it is written. Whoever asked lets it rest.
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
    await refresh(here);
    if (!kept) say(t("noAnswer"));
    else say(t(here.transcript.turns.at(-1)?.finish === "stopped" ? "stopped" : "done"));
  } catch (error) {
    clock.end();
    fail(error);
    await refresh(here).catch(() => {});
  }
  cancelAnimationFrame(painted);
}

// The next question may be asked: all that this one changed is known.
async function rest() {
  setBusy(false);
  showTalk();
  await showList().catch(fail);
  $("question").focus({ preventScroll: true });
}

function showStage(name) {
  const began = performance.now();
  const clock = { stage: (next) => ((name = next), tell()), end: () => clearInterval(timer) };
  const tell = () => say(`${t(name)}… ${number((performance.now() - began) / 1000, 0)} s`);
  const timer = setInterval(tell, 1000);
  tell();
  return clock;
}

// Turns that are there already stay, so that a screen reader hears only what is new.
function showTalk() {
  const { turns } = here.transcript, log = $("log");
  const keys = turns.map((turn) => JSON.stringify([document.documentElement.lang, here.name, turn]));
  let stay = keys.findIndex((key, i) => log.children[i]?.key !== key);
  if (stay < 0) stay = keys.length;
  while (log.children.length > stay) log.lastElementChild.remove();
  log.append(...turns.slice(stay).map((turn, k) => Object.assign(article(turn, stay + k), { key: keys[stay + k] })));
  toEnd();
  for (const id of ["export-json", "export-sr", "export-pdf"]) $(id).disabled = !turns.length;
  showHint();
  showModel();
}

function article(turn, i) {
  const seen = `/api/conversations/${here.name}/seen/${i}`;
  const pictures = element("span", ...turn.images.map((_, k) => drawn(`${seen}/${k}`, "modelSees")));
  const body = element("div", render(turn.answer));
  body.className = "answer";
  return element("article", asked(turn.question, pictures), body, ...unknown(turn), facts(turn, model), buttons(turn, i));
}

function toEnd() {
  $("log").lastElementChild?.scrollIntoView({ block: "end" });
}

function asked(question, pictures) {
  const text = element("p", question);
  const made = element("div", pictures, text);
  made.className = "question";
  made.setAttribute("role", "group");
  made.setAttribute("aria-label", t("you"));
  return made;
}

// A picture of the server's, which comes when it comes.
function drawn(path, told) {
  const image = new Image();
  image.alt = image.title = t(told);
  for (const over of ["load", "error"]) image.addEventListener(over, () => URL.revokeObjectURL(image.src));
  picture(path).then(({ url }) => (image.src = url)).catch((error) => image.isConnected && fail(error));
  return image;
}

function unknown(turn) {
  if (!turn.cannot_be_told) return [];
  const made = element("p", t("cannotBeTold"));
  made.className = "unknown";
  return [made];
}

function buttons(turn, i) {
  const made = element("p");
  made.className = "buttons";
  const add = (name, does) => {
    const button = element("button", t(name));
    button.className = `quiet ${name}`;
    button.addEventListener("click", () => Promise.resolve(does(button)).catch(fail));
    made.append(button);
  };
  add("copy", async (button) => {
    await navigator.clipboard.writeText(turn.answer);
    button.textContent = t("copied");
  });
  add("again", again);
  add("edit", async () => {
    if (busy) return;
    setBusy(true);
    const branching = post(`/api/conversations/${here.name}/branch`, { exchange: i });
    const { name } = await branching.finally(() => setBusy(false));
    if (turn.images.length) viewer.clear();
    $("question").value = turn.question;
    await open({ ...talk(name), asked: false, inherited: i, shown: here.shown.slice(0, i) });
    $("question").focus();
  });
  return made;
}

async function showList() {
  const listed = await get("/api/conversations");
  const focused = document.activeElement?.name;
  const made = listed.map(({ name, title }) => {
    const button = element("button", title);
    button.name = name;
    if (name === here.name) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      if (busy) return;
      viewer.clear();
      open(talk(name)).catch(fail);
    });
    return button;
  });
  $("conversations").replaceChildren(...made.map((button) => element("li", button)));
  made.find(({ name }) => name === focused)?.focus({ preventScroll: true });
}

function showModel() {
  if (!model) return;
  document.title = `${model.name} · ldrt-edge`;
  $("model-name").textContent = model.name;
  $("written").dataset.t = model.history ? "writtenEncrypted" : "nothingWritten";
  $("written").textContent = t($("written").dataset.t);
  $("model-facts").textContent = [model.type, model.runtime, ...evidence(model)].filter(Boolean).join(" · ");
  $("unreleased").textContent = model.unreleased ? t("unreleased", model.unreleased) : "";
}

function showHint() {
  const coming = unseen().length + here.waiting;
  const held = here.transcript.turns.some((turn) => turn.images.length);
  $("hint").textContent = coming ? t("willShow", coming) : held ? t("hasSeen") : t("noPicture");
  $("forget").disabled = !(here.naming || viewer.slots.length || viewer.overlays.length);
}

function setBusy(on) {
  busy = on;
  stopped = false;
  $("remove").disabled = on; // what is asked about is still wanted
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function unless(...statuses) {
  return (error) => {
    if (!statuses.includes(error.status)) throw error;
  };
}

function fail(error) {
  say(error.message, true);
}

async function add(files) {
  await viewer.add(files, (i, count) => say(t("uploading", i, count)));
  if (!$("status").classList.contains("wrong")) say("");
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
  $("stop").addEventListener("click", doing(stop));
  document.addEventListener("keydown", doing((event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) return stop();
  }));
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
    await open(talk());
    $("question").focus();
  }));
  $("forget").addEventListener("click", doing(forget));
  $("export-json").addEventListener("click", () => {
    save(new Blob([JSON.stringify(here.transcript, null, 1)], { type: "application/json" }), "json");
  });
  $("export-sr").addEventListener("click", doing(async () => {
    save(await (await send("GET", `/api/conversations/${here.name}/report`)).blob(), "dcm");
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
  addEventListener("pagehide", (event) => {
    if (event.persisted) return; // it may come back as it is
    leave(here, true);
    viewer.clear(true);
  });
  $("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
}

start().catch(fail);
