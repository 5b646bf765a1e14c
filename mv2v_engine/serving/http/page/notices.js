// What every part of the page says alike: errors, words for a screen reader, small buttons.

import { $, h, icon, replace } from "./dom.js";

/** A small button; `name` is of an icon. */
export function button(label, onclick, name = null) {
  return h("button", { type: "button", class: "button small", onclick }, name && icon(name), label);
}

/** Shows an error where it happened, with the server's own words. `again`: what a retry does. */
export function problem(place, error, again = null) {
  replace(
    place,
    h("div", { class: "problem", role: "alert" },
      h("p", null, error.message, error.code && h("code", null, error.code)),
      h("div", { class: "row" },
        again && button("Try again", again), button("Dismiss", () => replace(place)))),
  );
}

/**
 * Does what a button says, once at a time; it keeps the focus, which a disabled one loses. place:
 * where a problem is told.
 */
export async function attempt(pressed, place, action) {
  if (pressed.ariaBusy === "true") return;
  pressed.ariaBusy = "true";
  replace(place);
  try {
    await action();
  } catch (error) {
    problem(place, error);
  } finally {
    pressed.ariaBusy = null;
  }
}

/** Tells a screen reader. The same words twice in a row are said once. */
export function announce(words) {
  if (words !== $("live").textContent) $("live").textContent = words;
}
