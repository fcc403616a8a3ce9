// The picture panel: which pictures there are, through which window, and exactly what the model gets of them.
//
// Both pictures are drawn by the server, by the code that prepares them for the model. Zoom, position and inversion
// are of the view alone.

import { get, picture, send } from "./api.js";
import { element } from "./markdown.js";
import { address, frames, key, leftOut, meet, shot, sight, slotsOf, whole, wording } from "./slots.js";
import { level, number, t } from "./strings.js";

// Center and width in HU, as CT consoles commonly have them.
const PRESETS = { lung: [-600, 1500], bone: [400, 1800], soft: [40, 400], brain: [40, 80] };
const SETTLED_MS = 250;
const MOST_OVERLAYS = 8;
const NAMES_FOR_SURE = 3000; // below 64 KiB
const $ = (id) => document.getElementById(id);

export class Viewer {
  taken = new Set(); // files that the server keeps for this page
  slots = []; // see slots.js
  current = null;
  overlays = []; // dose and structures, for the pictures of their frame of reference
  clearings = 0; // files that were on their way when it was cleared are not wanted any more
  looking = Promise.resolve();

  // changed: what goes with the next question may have; settled: it will likely stay so. worded: asks a person what to
  // do with frames that text is burned into ("show", "blackOut" where it was found, or "": leave them out).
  constructor(changed, settled, failed, worded) {
    this.worded = worded;
    this.changed = changed;
    this.settled = settled;
    this.failed = failed;
    this.listen();
  }

  async add(files, progress) {
    const { clearings } = this;
    const sorted = [...files].sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
    let fresh = [];
    for (const [i, file] of sorted.entries()) {
      progress(i + 1, sorted.length);
      try {
        const one = await (await send("POST", "/api/pictures", { body: file })).json(); // the file's name stays here
        this.taken.add(one);
        fresh.push(one);
      } catch (error) {
        this.failed(error);
      }
      if (clearings !== this.clearings) return this.forget(fresh);
    }
    const choices = {}; // by what is known of the text
    for (const kind of ["found", "missed"]) {
      const worded = fresh.filter((one) => wording(one) === kind).map(({ name }) => ({ name, frame: 0 }));
      if (worded.length && clearings === this.clearings) choices[kind] = await this.worded(worded, kind === "found");
    }
    if (clearings !== this.clearings) return;
    const wanted = (one) => !wording(one) || choices[wording(one)];
    this.forget(fresh.filter((one) => !wanted(one)));
    fresh = fresh.filter(wanted);
    this.overlays.push(...fresh.filter((one) => one.overlay));
    fresh = fresh.filter((one) => !one.overlay);
    if (!fresh.length) return this.settleOverlays();
    const added = slotsOf(fresh, choices.found === "blackOut");
    this.slots.push(...added);
    this.settleOverlays();
    this.show(added.find((slot) => this.slots.includes(slot)) ?? this.slots.find((slot) => slot.over.length));
  }

  // Lay dose and structures over the pictures that they belong to; a dose without one stays a picture of its own.
  settleOverlays() {
    const places = this.slots.filter((slot) => slot.files[0].modality !== "RTDOSE");
    const belongs = (one) => places.filter((slot) => meet(slot.files[0], one));
    for (const slot of this.slots.filter((slot) => slot.files[0].modality === "RTDOSE")) {
      if (slot.files.length > 1 || !belongs(slot.files[0]).length) continue;
      this.overlays.push(slot.files[0]);
      this.slots = this.slots.filter((other) => other !== slot);
    }
    for (const slot of places) slot.over = this.overlays.filter((one) => meet(slot.files[0], one)).slice(-MOST_OVERLAYS);
    if (this.overlays.some((one) => !belongs(one).length)) this.failed(new Error(t("noPlace")));
    if (this.slots.includes(this.current)) this.show(this.current);
  }

  cover() {
    this.current.covered = !this.current.covered;
    this.draw();
  }

  // Look for text in what would be shown and nobody looked at yet, frames through windows, and ask about what is new.
  look() {
    this.looking = this.looking.catch(() => {}).then(async () => {
      for (let slot; (slot = this.slots.find((one) => !one.looked.has(sight(shot(one))))); ) {
        await this.lookAt(slot, slot.frame, shot(slot));
      }
    });
    return this.looking;
  }

  async lookAt(slot, place, { name, frame, window }) {
    const seen = { name, frame, window }, known = slot.lines.get(`${name} ${frame}`) ?? -1;
    try {
      const told = await get(sight(seen, "/text")), kind = told.text_lines > known && wording(told);
      slot.lines.set(`${name} ${frame}`, Math.max(told.text_lines, known));
      if (kind && !(kind === "found" && slot.blackOut) && !slot.leftOut.has(place) && this.slots.includes(slot)) {
        const choice = await this.worded([seen], kind === "found");
        if (choice === "blackOut") slot.blackOut = true;
        else if (!choice) slot.leftOut.add(place);
        if (choice === "blackOut" && slot === this.current) this.draw();
        this.changed();
      }
      slot.looked.add(sight(seen));
    } catch (error) {
      if (this.slots.includes(slot)) throw error;
    }
  }

  // What the server wants to hear of the pictures that the model has not seen so; shown: what it has, as it came.
  unseen(shown) {
    const seen = (slot) => shown.findLast(({ name }) => slot.files.some((file) => file.name === name));
    return this.slots.filter((slot) => !leftOut(slot) && JSON.stringify(seen(slot)) !== key(slot)).map(shot);
  }

  clear(leaving = false) {
    this.forget([...this.taken], leaving);
    this.clearings++;
    this.slots = [];
    this.overlays = [];
    this.show(null);
  }

  // What lay over the last picture goes with it: nothing would show that it is still there.
  remove() {
    const gone = [...this.current.files];
    this.slots = this.slots.filter((slot) => slot !== this.current);
    if (!this.slots.length) gone.push(...this.overlays.splice(0));
    this.forget(gone);
    this.show(this.slots.at(-1) ?? null);
    if (!this.current) $("stage").focus({ preventScroll: true });
    this.settled();
  }

  // Let the server keep files no longer. leaving: the page is left, behind which only so many names go out for sure.
  forget(files, leaving = false) {
    const sure = leaving ? NAMES_FOR_SURE : 0;
    for (const [some, keepalive] of [[files.slice(0, sure), true], [files.slice(sure), false]]) {
      if (!some.length) continue;
      send("POST", "/api/pictures/forget", { json: { names: some.map(({ name }) => name) }, keepalive })
        .then(() => some.forEach((one) => this.taken.delete(one)), this.failed);
    }
  }

  show(slot) {
    this.current = slot;
    $("viewer").classList.toggle("empty", !slot);
    for (const id of ["window-tools", "invert", "fit", "remove", "frames", "seen", "cover", "legend"]) $(id).hidden = !slot;
    const focused = $("strip").contains(document.activeElement);
    $("strip").replaceChildren(...this.slots.map((one, i) => {
      const tab = element("button", `${i + 1}`);
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-selected", one === slot);
      tab.tabIndex = one === slot ? 0 : -1;
      tab.addEventListener("click", () => this.show(one));
      return tab;
    }));
    $("strip").hidden = this.slots.length < 2;
    if (focused) $("strip").querySelector("[aria-selected=true]")?.focus();
    if (slot) {
      const count = frames(slot);
      $("frames").hidden = count < 2;
      $("frame").max = count - 1;
      this.draw();
    } else {
      replace($("view"), "");
      this.placeSeen(null);
      $("reading").textContent = "";
    }
    this.changed();
  }

  // One request at a time: while it runs, only the latest wish is remembered.
  async draw() {
    this.wanted = true;
    $("seen").setAttribute("aria-busy", true);
    this.place();
    if (this.drawing) return;
    this.drawing = true;
    while (this.wanted && this.current) {
      this.wanted = false;
      const slot = this.current;
      try {
        const drawn = await picture(address(shot(slot)));
        if (slot !== this.current) {
          URL.revokeObjectURL(drawn.url);
          continue;
        }
        replace($("view"), drawn.url);
        slot.about = drawn.about;
        this.place();
      } catch (error) {
        if (slot !== this.current) continue;
        replace($("view"), "");
        this.failed(error);
      }
    }
    this.drawing = false;
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.drawSeen(), SETTLED_MS);
    this.changed();
  }

  async drawSeen() {
    const slot = this.current;
    if (!slot) return;
    const asked = key(slot);
    const overtaken = () => slot !== this.current || asked !== key(slot); // by a change that draws it again
    try {
      await this.look();
      if (overtaken()) return;
      const seen = leftOut(slot) ? null : await picture(address(shot(slot), "/seen"));
      if (overtaken()) return seen && URL.revokeObjectURL(seen.url);
      this.placeSeen(seen);
      this.settled();
    } catch (error) {
      if (overtaken()) return;
      this.placeSeen(null);
      this.failed(error);
    }
  }

  // null: the model sees nothing of the current frame.
  placeSeen(seen) {
    const { tiles, tokens, seen_sha256: hash } = seen?.about ?? {};
    replace($("seen-view"), seen?.url ?? "");
    $("seen-facts").textContent = hash ? t("seenFacts", tiles, tokens, hash.slice(0, 12)) : "";
    $("seen-facts").title = hash ?? "";
    $("seen").setAttribute("aria-busy", false);
  }

  // Put on the page what is known of the current picture.
  place() {
    const slot = this.current;
    if (!slot) return;
    const { about } = slot;
    const view = $("view");
    view.style.transform = `translate(${slot.x}px, ${slot.y}px) scale(${slot.zoom})`;
    view.classList.toggle("inverted", slot.invert);
    $("invert").setAttribute("aria-pressed", slot.invert);
    $("cover").hidden = !slot.over.length;
    $("cover").setAttribute("aria-pressed", slot.covered);
    $("legend").replaceChildren(...(about.overlays ?? []).flatMap(({ legend }) => legend.map(([label, colour]) => {
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      swatch.setAttribute("aria-hidden", "true");
      swatch.style.backgroundColor = colour;
      return element("li", swatch, label);
    })));
    const grey = about.levels !== null;
    $("window-tools").hidden = !grey;
    if (grey) {
      const [center, width] = slot.window ?? about.window ?? whole(about);
      for (const [id, value] of [["center", center], ["width", width]]) {
        if (document.activeElement !== $(id)) $(id).value = Number(value.toPrecision(6));
      }
    }
    this.offerPresets();
    $("frame").value = slot.frame;
    $("frame-label").textContent = t("frame", slot.frame + 1, frames(slot));
    const mapped = about.window ? t("window", level(about.window[0]), level(about.window[1])) : t("fullRange");
    $("reading").textContent = [about.modality ?? about.format, `${about.width}×${about.height}`,
      ...(grey ? [mapped] : []), `${number(slot.zoom * 100, 0)} %`].join(" · ");
  }

  offerPresets() {
    const { about, window } = this.current;
    const named = about.modality === "CT" ? Object.keys(PRESETS) : [];
    const chosen = window ? named.find((name) => `${PRESETS[name]}` === `${window}`) ?? "own" : "asStored";
    $("preset").replaceChildren(...["asStored", ...named, "own"].map((name) => {
      const option = new Option(t(name), name, false, name === chosen);
      option.disabled = name === "own";
      return option;
    }));
  }

  setWindow(center, width) {
    const slot = this.current;
    if (!slot || slot.about.levels === null || !Number.isFinite(center) || !(width > 0)) return;
    slot.window = [center, width];
    this.draw();
  }

  // Move the window by shares of the picture's whole range.
  nudgeWindow(byCenter, byWidth) {
    const { about, window } = this.current;
    if (about.levels === null) return;
    const [center, width] = window ?? about.window ?? whole(about);
    const step = whole(about)[1];
    const finest = step / 4096;
    const round = (value) => (step > 100 ? Math.round(value) : Number(value.toPrecision(4)));
    this.setWindow(round(center + byCenter * step), Math.max(round(width + byWidth * step), step > 100 ? 1 : finest));
  }

  setFrame(frame) {
    const slot = this.current;
    if (!slot) return;
    slot.frame = Math.min(Math.max(frame, 0), frames(slot) - 1);
    this.draw();
  }

  zoom(by, x = 0, y = 0) {
    const slot = this.current;
    const zoom = Math.min(Math.max(slot.zoom * by, 1), 32);
    slot.x = x - (x - slot.x) * (zoom / slot.zoom);
    slot.y = y - (y - slot.y) * (zoom / slot.zoom);
    slot.zoom = zoom;
    if (zoom === 1) slot.x = slot.y = 0;
    this.place();
  }

  move(x, y) {
    this.current.x += x;
    this.current.y += y;
    this.place();
  }

  invert() {
    this.current.invert = !this.current.invert;
    this.place();
  }

  listen() {
    const stage = $("stage");
    stage.addEventListener("pointerdown", (event) => {
      if (!this.current || event.button) return;
      stage.setPointerCapture(event.pointerId);
      stage.focus({ preventScroll: true });
      this.drag = { x: event.clientX, y: event.clientY, move: event.shiftKey };
    });
    stage.addEventListener("pointermove", (event) => {
      if (!this.drag) return;
      const x = event.clientX - this.drag.x, y = event.clientY - this.drag.y;
      Object.assign(this.drag, { x: event.clientX, y: event.clientY });
      if (this.drag.move || this.current.about.levels === null) this.move(x, y);
      else this.nudgeWindow(y / 512, x / 512);
    });
    for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, () => (this.drag = null));
    stage.addEventListener("wheel", (event) => {
      if (!this.current) return;
      event.preventDefault();
      const box = stage.getBoundingClientRect();
      const x = event.clientX - box.left - box.width / 2, y = event.clientY - box.top - box.height / 2;
      this.zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, x, y);
    }, { passive: false });
    stage.addEventListener("keydown", (event) => this.key(event));
    $("strip").addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.show(this.slots.at((this.slots.indexOf(this.current) + step) % this.slots.length));
    });
    $("preset").addEventListener("change", (event) => {
      const preset = PRESETS[event.target.value];
      if (preset) this.setWindow(...preset);
      else {
        this.current.window = null;
        this.draw();
      }
    });
    for (const id of ["center", "width"]) {
      $(id).addEventListener("change", () => this.setWindow($("center").valueAsNumber, $("width").valueAsNumber));
    }
    $("frame").addEventListener("input", (event) => this.setFrame(event.target.valueAsNumber));
    $("invert").addEventListener("click", () => this.invert());
    $("cover").addEventListener("click", () => this.cover());
    $("fit").addEventListener("click", () => this.zoom(0));
    $("remove").addEventListener("click", () => this.remove());
  }

  key(event) {
    if (!this.current || event.ctrlKey || event.metaKey) return;
    const windowed = event.altKey;
    const does = {
      ArrowUp: () => (windowed ? this.nudgeWindow(-0.02, 0) : this.move(0, -24)),
      ArrowDown: () => (windowed ? this.nudgeWindow(0.02, 0) : this.move(0, 24)),
      ArrowLeft: () => (windowed ? this.nudgeWindow(0, -0.02) : this.move(-24, 0)),
      ArrowRight: () => (windowed ? this.nudgeWindow(0, 0.02) : this.move(24, 0)),
      PageUp: () => this.setFrame(this.current.frame - 1),
      PageDown: () => this.setFrame(this.current.frame + 1),
      "+": () => this.zoom(1.25),
      "-": () => this.zoom(0.8),
      "0": () => this.zoom(0),
      i: () => this.invert(),
      d: () => this.current.over.length && this.cover(),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }
}

function replace(image, url) {
  if (image.src) URL.revokeObjectURL(image.src);
  if (url) image.src = url;
  else image.removeAttribute("src");
}
