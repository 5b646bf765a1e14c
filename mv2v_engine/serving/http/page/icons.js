// The page's icons: outlines of 24 by 24, filled with the text's colour.

import { svg } from "./dom.js";

const OUTLINES = {
  play: "M8 5.5v13l11-6.5z",
  pause: "M7 5h3.6v14H7zM13.4 5H17v14h-3.6z",
  previous: "M6 6h2.4v12H6zM19 6v12l-9-6z",
  next: "M15.6 6H18v12h-2.4zM5 6v12l9-6z",
  light: "M12 7.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9zM11 2h2v3h-2zM11 19h2v3h-2zM2 11h3v2H2z"
    + "M19 11h3v2h-3zM4.2 5.6l1.4-1.4 2.1 2.1-1.4 1.4zM16.3 17.7l1.4-1.4 2.1 2.1-1.4 1.4z"
    + "M4.2 18.4l2.1-2.1 1.4 1.4-2.1 2.1zM16.3 6.3l2.1-2.1 1.4 1.4-2.1 2.1z",
  dark: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z",
  auto: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zm0 2v14a7 7 0 0 1 0-14z",
  key: "M14.5 3a6.5 6.5 0 0 0-6.2 8.5L3 16.8V21h4.2v-2.6h2.6v-2.6h2.1l.7-.7A6.5 6.5 0 1 0 14.5 3z"
    + "m2 3.2a1.9 1.9 0 1 1 0 3.8 1.9 1.9 0 0 1 0-3.8z",
  download: "M11 4h2v8.2l2.8-2.8 1.4 1.4L12 16l-5.2-5.2 1.4-1.4 2.8 2.8zM5 18h14v2H5z",
  branch: "M7 3a2.5 2.5 0 0 1 1 4.8v3.7c.9-.7 2-1 3.2-1h1.6c1.6 0 2.9-1 3.2-2.5a2.5 2.5 0 1 1 2 .1"
    + " 5.2 5.2 0 0 1-5.2 4.4h-1.6c-1.7 0-3 1.1-3.2 2.7A2.5 2.5 0 1 1 6 16.2V7.8"
    + "A2.5 2.5 0 0 1 7 3z",
  trash: "M9 4h6l1 1.5h4v2H4v-2h4zM6 9h12l-.9 11.5H6.9zm3.5 2.5v6.5H11v-6.5zm3.5 0v6.5h1.5v-6.5z",
  close: "M6.7 5.3 12 10.6l5.3-5.3 1.4 1.4L13.4 12l5.3 5.3-1.4 1.4L12 13.4l-5.3 5.3-1.4-1.4"
    + " 5.3-5.3-5.3-5.3z",
};

export function icon(name) {
  return svg(
    "svg",
    { viewBox: "0 0 24 24", width: 20, height: 20, "aria-hidden": true, class: "glyph" },
    svg("path", { d: OUTLINES[name], fill: "currentColor", "fill-rule": "evenodd" }),
  );
}
