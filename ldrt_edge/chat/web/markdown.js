// The Markdown that models write, as elements: headings, lists, code, bold, italic. Built node by node, never parsed
// as HTML; links and pictures stay text, since nothing here may lead elsewhere.

const INLINE = /(`+)(.+?)\1|(\*\*|__)(?=\S)(.+?)\3|(?<![\w*])\*(?=\S)([^*]+?)\*(?![\w*])/s;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

export function render(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let paragraph = [];
  const close = () => {
    if (paragraph.length) out.append(element("p", ...inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i++) {
    const heading = /^(#{1,6})\s+(.*)$/.exec(lines[i]);
    if (/^\s*```/.test(lines[i])) {
      close();
      const code = [];
      while (++i < lines.length && !/^\s*```/.test(lines[i])) code.push(lines[i]);
      out.append(element("pre", element("code", code.join("\n"))));
    } else if (heading) {
      close();
      out.append(element(heading[1].length < 3 ? "h3" : "h4", ...inline(heading[2])));
    } else if (ITEM.test(lines[i])) {
      close();
      const first = ITEM.exec(lines[i]);
      const list = element(first[1] ? "ol" : "ul");
      if (first[1]) list.start = Number(first[1]);
      for (let item; i < lines.length && (item = ITEM.exec(lines[i])); i++) list.append(element("li", ...inline(item[2])));
      i--;
      out.append(list);
    } else if (lines[i].trim()) {
      paragraph.push(lines[i]);
    } else {
      close();
    }
  }
  close();
  return out;
}

function inline(text) {
  const nodes = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(text.slice(0, found.index));
    if (found[1]) nodes.push(element("code", found[2]));
    else if (found[3]) nodes.push(element("strong", ...inline(found[4])));
    else nodes.push(element("em", ...inline(found[5])));
  }
  return text ? [...nodes, text] : nodes;
}

export function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}
