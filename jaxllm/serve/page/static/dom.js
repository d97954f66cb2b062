// Elements are made from text, never from markup: what a model writes cannot become part of the page.

export const byId = (id) => document.getElementById(id);

/** A new element with a class and children, which are elements or text. */
export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
