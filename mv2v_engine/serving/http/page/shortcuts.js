// What the keyboard does wherever nothing else takes the key.

import { $, h, replace } from "./dom.js";
import { icon } from "./icons.js";

/** workspace: () the one that is shown, or null. */
export function setUpShortcuts(workspace) {
  const on = (action) => () => {
    const shown = workspace();
    if (!shown?.session) return false;
    action(shown);
    return true;
  };
  const focus = (selector) => on(() => document.querySelector(selector)?.focus());
  const press = (selector) => on(() => document.querySelector(selector)?.click());
  const rows = [
    [" ", "Space", "Play or pause", on(({ player }) => player.toggle())],
    [",", ",", "One frame back", on(({ player }) => player.step(-1))],
    [".", ".", "One frame on", on(({ player }) => player.step(1))],
    ["-", "-", "Slower", on(({ player }) => player.changeRate(-1))],
    ["+", "+", "Faster", on(({ player }) => player.changeRate(1))],
    ["l", "L", "Loop", on(({ player }) => player.setLoop(!player.loops))],
    ["[", "[", "What came before in the history", on((shown) => shown.move(-1))],
    ["]", "]", "What came next in the history", on((shown) => shown.move(1))],
    ["0", "0", "The source", on((shown) => shown.pick("source"))],
    [null, "1–9", "Turn 1 to 9"],
    ["c", "C", "Compare with the source, or no longer", on((shown) =>
      shown.compare(shown.picked.length > 1 ? null : "source"))],
    ["w", "W", "Wipe or side by side", on(({ stage }) =>
      stage.setMode(stage.mode === "wipe" ? "side" : "wipe"))],
    ["f", "F", "Full screen", on(({ stage }) => stage.toggleFull())],
    ["z", "Z", "Actual size or fitted", on(({ stage }) => stage.toggleFit())],
    ["s", "S", "Say the next move", on(({ composer }) => composer.focus())],
    ["r", "R", "Render", press("#render")],
    ["n", "N", "Name this turn", focus("#turn-name")],
    ["*", "*", "Favourite", press("#shown [data-part=star]")],
    ["Delete", "Delete", "Delete this turn", press("#shown [data-part=delete]")],
    ["?", "?", "These keys", () => show()],
  ];
  const actions = new Map(rows.map(([key, , , action]) => [key, action]));
  for (let number = 1; number < 10; number += 1) {
    actions.set(String(number), on((shown) => shown.pick(String(number))));
  }
  const show = () => {
    $("keys").showModal();
    return true;
  };
  replace($("keys-open"), icon("keyboard"));
  $("keys-open").addEventListener("click", show);
  replace($("keys-list"), rows.map(([, name, words]) =>
    h("div", null, h("dt", null, h("kbd", null, name)), h("dd", null, words))));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
    if (event.target.closest("input:not([type=range]), textarea, select, dialog")) return;
    // these have keys of their own
    const isPressed = event.target.closest("button, a, summary, canvas, [role=slider]");
    if (isPressed && [" ", "Delete", "0"].includes(event.key)) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (actions.get(key)?.()) event.preventDefault();
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
