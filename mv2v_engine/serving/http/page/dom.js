// Elements without a framework. What stands still is in index.html, and found by `data-part`.

function present(children) {
  return children.flat(2).filter((child) => child !== false && (child ?? null) !== null);
}

/** An element. props: attributes, `onclick` and the like, and `vars`, its CSS variables. */
export function h(tag, props, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if ((value ?? null) === null) continue;
    if (name.startsWith("aria-")) element.setAttribute(name, String(value));
    else if (value === false) continue;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") setVars(element, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...present(children));
  return element;
}

/** CSS variables; a style attribute would be refused by the page's content security policy. */
export function setVars(element, vars) {
  for (const [name, value] of Object.entries(vars)) element.style.setProperty(name, value);
}

export function replace(element, ...children) {
  element.replaceChildren(...present(children));
}

export const $ = (id) => document.getElementById(id);

/** What is in a template, once more. */
export const cloned = (id) => $(id).content.cloneNode(true);

/** The elements of a piece of the page by their `data-part`. */
export function partsOf(root) {
  return Object.fromEntries(
    [...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
}

/** actions: by the part, what a click on it does: (the part). */
export function onClick(root, actions) {
  root.addEventListener("click", ({ target }) => {
    const part = target.closest("[data-part]");
    if (root.contains(part)) actions[part.dataset.part]?.(part);
  });
}

/** Leaves what is of this kind of model: "views" or "edits". */
export function keepKind(root, kind) {
  for (const part of root.querySelectorAll(`[data-of]:not([data-of=${kind}])`)) part.remove();
}

export function setIcon(glyph, name) {
  glyph.querySelector("use").setAttribute("href", `#icon-${name}`);
}

export function icon(name) {
  const glyph = cloned("glyph");
  setIcon(glyph, name);
  return glyph;
}
