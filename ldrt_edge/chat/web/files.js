// Files into the page, and out of it.

import { element } from "./markdown.js";

// The files of what was dropped, folders walked through.
export async function dropped(items) {
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

export function save(blob, ending) {
  const url = URL.createObjectURL(blob);
  const link = element("a");
  link.href = url;
  link.download = `ldrt-edge-conversation.${ending}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
