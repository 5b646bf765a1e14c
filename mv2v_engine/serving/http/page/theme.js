// Before the first paint, so that nothing flashes or jumps: a plain script, not a module.
{
  const theme = localStorage.getItem("mv2v-theme");
  if (theme) document.documentElement.dataset.theme = theme;
  if (location.hash.includes("session=")) document.documentElement.dataset.view = "session";
}
