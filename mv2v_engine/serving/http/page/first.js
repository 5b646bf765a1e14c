// Before the first paint, so that nothing flashes or jumps: a plain script, not a module.
{
  const theme = localStorage.getItem("mv2v-theme");
  if (theme) document.documentElement.dataset.theme = theme;
  const id = new URLSearchParams(location.hash.slice(1)).get("session");
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
    begin(`v1/sessions/${id}/turns`, jobs);
  }
}
