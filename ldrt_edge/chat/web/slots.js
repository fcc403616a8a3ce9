// What a slot of the picture panel holds: one picture, or the slices of a series, and how the server is told of it.

// Slots for files that the server took. blackOut: text that is found goes under black boxes, in every frame. looked:
// frames through windows (see `sight`) in which text was looked for; lines: how many a person was asked about, by name
// and frame; leftOut: frames that the model may not see for it.
export function slotsOf(taken, blackOut) {
  return stacks(taken).map((files) => ({
    files, frame: files.length >> 1, window: null, about: files[0], zoom: 1, x: 0, y: 0, invert: false,
    over: [], covered: true, leftOut: new Set(),
    looked: new Set(files.map(({ name }) => sight({ name, frame: 0, window: null }))),
    lines: new Map(files.map(({ name, text_lines }) => [`${name} 0`, text_lines])),
    blackOut: blackOut && files.some((file) => wording(file) === "found"),
  }));
}

// Slices of one series, modality and size make a stack; all else is a picture of its own.
function stacks(taken) {
  const groups = new Map();
  for (const one of taken) {
    const slice = one.series !== null && one.frames === 1 && one.modality !== "RTDOSE";
    const shared = slice ? [one.series, one.modality, one.width, one.height].join() : one.name;
    groups.set(shared, groups.get(shared) ?? []).get(shared).push(one);
  }
  for (const group of groups.values()) {
    if (group.every((one) => one.position !== null)) group.sort((a, b) => a.position - b.position);
  }
  return [...groups.values()];
}

export function frames(slot) {
  return slot.files.length > 1 ? slot.files.length : slot.files[0].frames;
}

export function shot(slot) {
  const stacked = slot.files.length > 1;
  return {
    name: slot.files[stacked ? slot.frame : 0].name, frame: stacked ? 0 : slot.frame, window: slot.window,
    over: slot.covered ? slot.over.map((one) => one.name) : [], black_out: slot.blackOut,
  };
}

// What is known of the text in a frame: nothing (null), that it was "found", or that it must be there ("missed").
export function wording({ burned_in, text_lines }) {
  if (text_lines) return "found";
  return burned_in ? "missed" : null;
}

export function leftOut(slot) {
  return slot.leftOut.has(slot.frame);
}

export function meet(one, other) {
  return one.frames_of_reference.some((word) => other.frames_of_reference.includes(word));
}

export function key(slot) {
  return JSON.stringify(shot(slot));
}

// A frame through a window, and nothing else.
export function sight({ name, frame, window }, rest = "") {
  return address({ name, frame, window }, rest);
}

export function address({ name, frame, window = null, over = [], black_out = false }, rest = "") {
  const query = new URLSearchParams({ frame, ...(window && { window }) });
  for (const one of over) query.append("over", one);
  if (black_out) query.set("black_out", 1);
  return `/api/pictures/${name}${rest}?${query}`;
}

export function whole({ levels: [low, high] }) {
  return [(low + high) / 2, high - low || 1];
}
