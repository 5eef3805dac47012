"use strict";
(async () => {
  const command = document.getElementById("command"), copy = document.getElementById("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(command.textContent);
        copy.textContent = "Copied";
      } catch {  // no clipboard here: select the text, so that one key press copies it
        getSelection().selectAllChildren(command);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1600);
    });
  }

  const data = document.getElementById("data");
  if (!data) return;
  const { item, axes } = JSON.parse(data.textContent);
  const phone = matchMedia("(max-width: 46rem)"), dark = matchMedia("(prefers-color-scheme: dark)");
  const views = await Bokeh.embed.embed_item(item);
  const view = views.roots ? views.roots[0] : [...views][0], plot = view.model;
  if (view.canvas_view?.events_el) view.canvas_view.events_el.style.touchAction = "pan-y";  // a finger scrolls the page
  const marks = plot.renderers.filter((renderer) => (renderer.name || "").startsWith("points "));
  const stairs = plot.renderers.filter((renderer) => (renderer.name || "").startsWith("stairs "));

  // A canvas knows no CSS: its colours are copied from the page's variables, again at every change of scheme.
  const paint = () => {
    const style = getComputedStyle(document.documentElement), colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const fill = { dense: "ink", chosen: "accent", nearest: "accent", front: "paper", tried: "tried" };
    const line = { dense: "paper", chosen: "paper", nearest: "paper", front: "front", tried: "paper" };
    for (const mark of marks) {
      const kind = mark.name.slice(7), thin = kind === "tried" ? 0.6 : 1.6;
      mark.glyph.setv({ fill_color: { value: colour(fill[kind]) }, line_color: { value: colour(line[kind]) },
                        line_width: { value: thin }, fill_alpha: { value: 1 }, line_alpha: { value: 1 } });
    }
    for (const stair of stairs) stair.glyph.setv({ line_color: { value: colour("front") } });
    for (const panel of [...plot.below, ...plot.left]) panel.setv({ major_label_text_color: colour("muted") });
    for (const thing of plot.center) {
      if ("grid_line_color" in thing) thing.setv({ grid_line_color: colour("line") });
      if (thing.name === "floor") thing.setv({ line_color: colour("warn") });
    }
  };
  const show = (key) => {
    for (const mark of marks) mark.glyph.setv({ x: { field: key } });
    for (const stair of stairs) stair.visible = stair.name === `stairs ${key}`;
    const axis = axes[key], panel = plot.below[0];
    panel.ticker.ticks = axis.ticks;
    panel.major_label_overrides = new Map(Object.entries(axis.labels).map(([tick, label]) => [Number(tick), label]));
    plot.x_range.setv({ start: axis.start, end: axis.end, reset_start: axis.start, reset_end: axis.end });
  };
  const fit = () => { plot.height = phone.matches ? 340 : 400; };
  paint();
  fit();
  dark.addEventListener("change", paint);
  phone.addEventListener("change", fit);
  const choices = document.getElementById("axes");
  choices.hidden = false;
  choices.addEventListener("change", (event) => show(event.target.value));
  show(choices.querySelector("input:checked").value);  // a reloaded page keeps its choice in some browsers
  document.getElementById("plot").dataset.drawn = "yes";
})();
