// Before the first paint, so that a chosen theme does not flash: a plain script, not a module.
{
  const theme = localStorage.getItem("mv2v-theme");
  if (theme) document.documentElement.dataset.theme = theme;
}
