(() => {
  "use strict";
  const all = (query, inside = document) => [...inside.querySelectorAll(query)];
  const tip = document.getElementById("tip");
  const spoken = document.getElementById("spoken");
  let current = null;

  const light = (inside, name) => {
    const groups = all("g[data-series]", inside);
    const several = name !== null && new Set(groups.map(group => group.dataset.series)).size > 1;
    inside.classList.toggle("focused", several);
    for (const group of groups) group.classList.toggle("lit", several && group.dataset.series === name);
  };
  const show = (mark, aloud) => {
    if (current === mark && !aloud) return;
    hide();
    current = mark;
    mark.classList.add("here");
    const series = mark.closest("g[data-series]");
    if (series && mark.closest(".plane")) light(mark.closest("figure"), series.dataset.series);
    tip.textContent = mark.dataset.tip;
    if (aloud) spoken.textContent = mark.dataset.tip.replaceAll("\n", ", ");
    const place = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = place.left + place.width / 2 - size.width / 2;
    const above = place.top - size.height - 10;
    tip.style.left = Math.max(8, Math.min(innerWidth - size.width - 8, left)) + "px";
    tip.style.top = (above > 8 ? above : place.bottom + 10) + "px";
    tip.classList.add("shown");
  };
  const hide = () => {
    if (!current) return;
    current.classList.remove("here");
    light(current.closest("figure"), null);
    current = null;
    tip.classList.remove("shown");
  };
  const visible = plot => all(".mark", plot).filter(mark => mark.getClientRects().length);

  const nearest = (plot, x, y) => {
    let best = null, distance = 44 ** 2;
    for (const mark of visible(plot)) {
      const box = mark.getBoundingClientRect();
      const dx = Math.max(box.left - x, 0, x - box.right), dy = Math.max(box.top - y, 0, y - box.bottom);
      const far = dx * dx + dy * dy;
      if (far < distance) { distance = far; best = mark; }
    }
    return best;
  };
  const step = (plot, key) => {
    const marks = visible(plot);
    const at = marks.indexOf(current);
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: marks.length - 1 }[key];
    if (next === undefined || !marks.length) return false;
    const mark = marks[at < 0 && next < 0 ? marks.length - 1 : (next + marks.length) % marks.length];
    mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    show(mark, true);
    return true;
  };
  for (const plot of all(".plot")) {
    const point = event => {
      const mark = nearest(plot, event.clientX, event.clientY);
      mark ? show(mark) : hide();
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("focusout", hide);
    plot.addEventListener("keydown", event => {
      if (event.key === "Escape") hide();
      else if (step(plot, event.key)) event.preventDefault();
    });
  }
  addEventListener("scroll", hide, { passive: true, capture: false });

  for (const entry of all(".key button, .key span")) {
    const figure = entry.closest("figure");
    for (const [event, name] of [["pointerenter", entry.dataset.for], ["focus", entry.dataset.for], ["pointerleave", null], ["blur", null]])
      entry.addEventListener(event, () => light(figure, name));
  }
  for (const button of all(".key button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      const where = button.closest("section");
      for (const twin of all(".key button", where))
        if (twin.dataset.for === button.dataset.for) twin.setAttribute("aria-pressed", on);
      for (const part of all("[data-series]", where))
        if (part.dataset.series === button.dataset.for) part.toggleAttribute("hidden", !on);
    });
  }
  for (const select of all("select[data-choices]")) {
    const parts = all("[data-choice]", select.closest("figure"));
    const choose = () => parts.forEach(part => part.toggleAttribute("hidden", part.dataset.choice !== select.value));
    select.closest(".pick").hidden = false;
    select.addEventListener("change", choose);
    choose();
  }
  for (const button of all(".numbers thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), body = button.closest("table").tBodies[0];
      const up = head.getAttribute("aria-sort") === "descending";
      for (const other of all("th", head.parentElement)) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => {
        const cell = row.cells[head.cellIndex];
        return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
      };
      const known = v => typeof v === "number";
      const order = (a, b) => known(a) && known(b) ? a - b : known(a) ? 1 : known(b) ? -1 : a.localeCompare(b);
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b)));
      body.append(...rows);
    });
  }
  for (const button of all("button[data-save]")) {
    button.addEventListener("click", () => {
      const table = button.closest("details, .card").querySelector("table");
      const quoted = cell => '"' + cell.textContent.trim().replaceAll('"', '""') + '"';
      const text = [...table.rows].map(row => [...row.cells].map(quoted).join(",")).join("\n") + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = button.dataset.save + ".csv";
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
})();
