// A small part of Markdown, as elements: headings, lists, code, bold, italics and links to the web.

import { element } from "./dom.js";

const FENCE = /^ {0,3}```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*(?:([-*+])|\d{1,9}[.)])\s+(.*)$/;
const INLINE = /(`+)(.+?)\1|\*\*(\S(?:.*?\S)?)\*\*|\*([^\s*](?:[^*]*[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

/** The elements that a text stands for; a text that breaks off, as in a stream, is shown as it is. */
export function render(text) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const endParagraph = () => {
    const joined = paragraph.join("\n").trim();
    if (joined) blocks.push(element("p", "", ...inline(joined)));
    paragraph = [];
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const item = ITEM.exec(line);
    if (FENCE.test(line)) {
      endParagraph();
      const code = [];
      while (++i < lines.length && !FENCE.test(lines[i])) code.push(lines[i]);
      blocks.push(element("pre", "", element("code", "", code.join("\n"))));
    } else if (HEADING.test(line)) {
      endParagraph();
      blocks.push(element("h3", "", ...inline(HEADING.exec(line)[1])));
    } else if (item) {
      endParagraph();
      const kind = item[1] ? "UL" : "OL";
      const last = blocks.at(-1);
      const list = last?.tagName === kind && ITEM.test(lines[i - 1]) ? last : element(kind);
      if (list !== last) blocks.push(list);
      list.append(element("li", "", ...inline(item[2])));
    } else if (line.trim() === "") {
      endParagraph();
    } else {
      paragraph.push(line);
    }
  }
  endParagraph();
  return blocks;
}

function inline(text) {
  const parts = [];
  for (let match; (match = INLINE.exec(text)); text = text.slice(match.index + match[0].length)) {
    const [, , code, bold, italic, label, url] = match;
    parts.push(text.slice(0, match.index));
    if (code !== undefined) parts.push(element("code", "", code));
    else if (bold !== undefined) parts.push(element("strong", "", ...inline(bold)));
    else if (italic !== undefined) parts.push(element("em", "", ...inline(italic)));
    else {
      const link = element("a", "", label);
      link.href = url;
      link.rel = "noopener noreferrer";
      link.target = "_blank";
      parts.push(link);
    }
  }
  parts.push(text);
  return parts;
}
