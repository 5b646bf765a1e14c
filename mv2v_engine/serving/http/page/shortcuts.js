// What the keyboard does wherever nothing else takes the key.

import { $ } from "./dom.js";

/** workspace: () the one that is shown, or null. */
export function setUpShortcuts(workspace) {
  const actions = {
    "-": ({ player }) => player.changeRate(-1),
    "+": ({ player }) => player.changeRate(1),
    "[": (shown) => shown.move(-1),
    "]": (shown) => shown.move(1),
    0: (shown) => shown.pick("source"),
    C: (shown) => shown.compare(shown.picked.length > 1 ? null : "source"),
    W: ({ stage }) => stage.setMode(stage.mode === "wipe" ? "side" : "wipe"),
  };
  for (let number = 1; number < 10; number += 1) {
    actions[number] = (shown) => shown.pick(String(number));
  }
  $("keys-open").addEventListener("click", () => $("keys").showModal());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
    if (event.target.closest("input:not([type=range]), textarea, select, dialog")) return;
    // these have keys of their own
    const isPressed = event.target.closest("button, a, summary, canvas, [role=slider]");
    if (isPressed && [" ", "Delete", "0"].includes(event.key)) return;
    const key = event.key === " " ? "Space"
      : event.key.length === 1 ? event.key.toUpperCase() : event.key;
    // what says itself which key it has is pressed, or written into
    const named = document.querySelector(`[aria-keyshortcuts="${CSS.escape(key)}"]`);
    const shown = workspace();
    if (named && !named.closest("[hidden], [inert]")) {
      if (named.matches("button")) named.click();
      else named.focus();
    } else if (shown?.session && Object.hasOwn(actions, key)) actions[key](shown);
    else return;
    event.preventDefault();
  });
}

/** What has the focus may go from the page: then the place that it stood in has it. */
export function keepFocus(places) {
  let last = null;
  document.addEventListener("focusin", (event) => { last = event.target; });
  const look = () => {
    const isLost = document.activeElement === document.body && last && !last.isConnected;
    if (!isLost || document.querySelector("dialog[open]")) return;
    last = null;
    places().find((place) => place && !place.closest("[hidden]"))?.focus({ preventScroll: true });
  };
  new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
}
