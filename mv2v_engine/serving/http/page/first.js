// Before the first paint, so that nothing flashes or jumps: a plain script, not a module.
{
  const theme = localStorage.getItem("mv2v-theme");
  if (theme) document.documentElement.dataset.theme = theme;
  const { session: id, show } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (id) {
    document.documentElement.dataset.view = "session";
    // what api.js is going to ask for is asked for while the modules still come
    const token = sessionStorage.getItem("mv2v-token");
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    window.begun = {};
    const begin = (path, before) => {
      const address = new URL(path, document.baseURI).href;
      const answer = Promise.resolve(before).then(() =>
        fetch(address, { headers, cache: "no-store" }));
      answer.catch(() => {}); // it is told where it is wanted
      return window.begun[address] = answer;
    };
    begin("v1/models");
    const jobs = begin(`v1/jobs?session=${id}&limit=100`);
    // jobs first, as in api.js
    begin(`v1/sessions/${id}`, jobs);
    const turns = `v1/sessions/${id}/turns`;
    begin(turns, jobs).then((answer) => answer.clone().json()).then(({ data }) => {
      const shown = show ? data.find(({ number }) => String(number) === show) : data.at(-1);
      if (!shown) return;
      for (const file of ["thumbnail", "video"]) begin(`${turns}/${shown.number}/${file}`);
    }).catch(() => {});
  }
}
