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

  // Tables: a button in each head whose column has numbers (or names) sorts the rows; what has no number stays last.
  for (const table of document.querySelectorAll("table.sorts")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    const value = (row, i) => i ? Number(row.cells[i].dataset.value ?? NaN) : row.cells[0].textContent.trim();
    heads.forEach((head, i) => {
      const rows = [...body.rows], link = head.querySelector("a.term");
      if (rows.length < 2 || (i && rows.every((row) => Number.isNaN(value(row, i))))) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = head.textContent.trim();
      if (link) button.dataset.term = link.hash.slice(1);
      button.addEventListener("click", () => {
        const up = (head.ariaSort || (i ? "ascending" : "descending")) === "descending", sign = up ? 1 : -1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.ariaSort = up ? "ascending" : "descending";
        rows.sort((a, b) => {
          const x = value(a, i), y = value(b, i);
          if (!i) return sign * x.localeCompare(y, "en", { numeric: true });
          return Number.isNaN(x) ? (Number.isNaN(y) ? 0 : 1) : Number.isNaN(y) ? -1 : sign * (x - y);
        });
        body.append(...rows);
      });
      head.replaceChildren(button);
    });
  }

  // Terms: the explanation that stands at the end of the page, beside the term that is pointed at or has the focus.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  let shown = null, later;
  const close = () => { tip.hidden = true; shown = null; };
  const place = () => {
    if (!shown) return;
    const at = shown.getBoundingClientRect(), size = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const above = at.bottom + size.height + 12 > innerHeight && at.top > size.height + 12;
    tip.style.left = `${Math.max(8, Math.min(at.left, wide - size.width - 8))}px`;
    tip.style.top = `${above ? at.top - size.height - 6 : at.bottom + 6}px`;
  };
  const open = (link) => {
    clearTimeout(later);
    shown = link;
    tip.textContent = document.getElementById(link.getAttribute("aria-describedby")).textContent;
    tip.hidden = false;
    place();
  };
  const leave = () => { later = setTimeout(close, 250); };  // time to move onto the tip, which may be read and copied
  tip.addEventListener("pointerenter", () => clearTimeout(later));
  tip.addEventListener("pointerleave", leave);
  for (const link of document.querySelectorAll("a.term, button[data-term]")) {
    const id = link.dataset.term || link.hash.slice(1), meaning = document.getElementById(id).querySelector("dd");
    meaning.id = `${id}-meaning`;
    link.setAttribute("aria-describedby", meaning.id);
    let again = false;
    link.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") open(link); });
    link.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
    link.addEventListener("focus", () => open(link));
    link.addEventListener("blur", leave);
    link.addEventListener("pointerdown", () => { again = shown === link; });
    if (link.hash) link.addEventListener("click", (event) => {  // a finger cannot point: the first tap shows the tip
      if (event.pointerType === "touch" && !again) event.preventDefault();
    });
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
  addEventListener("scroll", place, { capture: true, passive: true });

  const data = document.getElementById("data");
  if (!data) return;
  const { item, axes } = JSON.parse(data.textContent);
  const views = await Bokeh.embed.embed_item(item);
  const view = views.roots ? views.roots[0] : [...views][0], plot = view.model;
  if (view.canvas_view?.events_el) view.canvas_view.events_el.style.touchAction = "pan-y";  // a finger scrolls the page
  // The chart is an image with a text and a table beside it: its tools are for pointers, and no stops of the Tab key.
  const still = (root) => {
    for (const part of root.querySelectorAll("*")) {
      if (part.hasAttribute("tabindex")) part.tabIndex = -1;
      if (part.shadowRoot) still(part.shadowRoot);
    }
  };
  const marks = plot.renderers.filter((renderer) => (renderer.name || "").startsWith("points "));
  const stairs = plot.renderers.filter((renderer) => (renderer.name || "").startsWith("stairs "));

  // A canvas knows no CSS: its colours are copied from the page's variables, again at every change of scheme.
  const chart = document.getElementById("plot"), phone = matchMedia("(max-width: 46rem)");
  const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print");
  const paint = () => {
    if (print.matches) return;  // too late, a canvas is drawn in the next frame: page.css inverts what is dark
    chart.dataset.scheme = dark.matches ? "dark" : "light";
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
  still(chart);
  chart.dataset.drawn = "yes";
})();
