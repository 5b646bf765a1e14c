// Before the first paint, so that nothing flashes or jumps: no module, and within the page.
{
  const theme = localStorage.getItem("mv2v-theme");
  if (theme) document.documentElement.dataset.theme = theme;
  const { session, show, beside } =
    Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (session) {
    document.documentElement.dataset.view = "session";
    // what api.js is going to ask for is asked for while the module still comes
    const token = sessionStorage.getItem("mv2v-token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    window.begun = {};
    const begin = (path) => {
      const address = new URL(path, document.baseURI).href;
      const answer = window.begun[address] = fetch(address, { headers, cache: "no-store" });
      const copy = answer.then((given) => given.clone());
      copy.catch(() => {}); // it is told where it is wanted
      return copy;
    };
    const data = async (answer) => (await (await answer).json()).data;
    const whole = `v1/sessions/${session}`;
    const [turns, jobs] =
      [`${whole}/turns`, `v1/jobs?session=${session}&limit=100`, whole, "v1/models"].map(begin);
    /** The number of the turn that is going to be shown alone, if one is. */
    const alone = async () => {
      if (beside || show === "source") return null;
      if (Number(show)) return show;
      const { number, created } = (await data(turns)).at(-1);
      const isOpen = ({ state, ended }) => ["queued", "running", "failed"].includes(state)
        && (ended ?? Infinity) > created;
      return !(await data(jobs)).some(isOpen) && number;
    };
    // its picture stands before the rest is made, and under the video until that has one
    const stand = async () => {
      const number = await alone();
      if (!number) return;
      const path = `${whole}/turns/${number}/thumbnail`;
      const answer = begin(path);
      begin(`${whole}/turns/${number}/video`);
      const image = new Image();
      image.alt = "";
      image.dataset.path = path;
      const bytes = new Uint8Array(await (await answer).arrayBuffer());
      const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
      image.src = `data:image/jpeg;base64,${btoa(text)}`; // sooner there than an object's URL
      await image.decode();
      if (document.readyState === "loading") {
        await new Promise((resolve) => { document.onreadystatechange = resolve; });
      }
      const area = document.querySelector(".stage");
      area.style.setProperty("--aspect", image.naturalWidth / image.naturalHeight);
      area.querySelector(".pane").append(image);
      window.begun.picture = image;
      // until it is painted, which not every browser tells, and is not in the background
      await new Promise((resolve) => {
        new PerformanceObserver((list) => {
          if (list.getEntries().some(({ element }) => element === image)) resolve();
        }).observe({ type: "largest-contentful-paint" });
        setTimeout(resolve, 200);
      });
    };
    window.begun.stands = stand().catch(() => {});
  }
}
