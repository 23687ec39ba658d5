// What the viewer does beyond links and forms: keys, addresses without empty fields, and following a running sweep.
"use strict";
(() => {
  const typing = (e) => e.target.closest("input, select, textarea, [contenteditable]");
  const links = () => [...document.querySelectorAll("a[data-row]")].filter((a) => a.offsetParent !== null);

  function move(step) {
    const all = links();
    if (!all.length) return;
    const row = document.activeElement && document.activeElement.closest("tr, li");
    let at = all.findIndex((a) => a === document.activeElement || (row && row.contains(a)));
    at = at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + step, 0), all.length - 1);
    all[at].focus();
    all[at].scrollIntoView({ block: "nearest" });
  }

  function follow(selector) {
    const link = document.querySelector(selector);
    if (link) link.click();
  }

  const help = document.getElementById("keys");
  const keys = {
    "/": () => { const q = document.getElementById("q"); q.focus(); q.select(); },
    j: () => move(1), ArrowDown: () => links().length && move(1),
    k: () => move(-1), ArrowUp: () => links().length && move(-1),
    n: () => follow("a[rel=next]"), p: () => follow("a[rel=prev]"),
    m: () => follow("a[data-map]"), t: () => follow("a[data-table]"),
    "?": () => help.open ? help.close() : help.showModal(),
  };
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || typing(e)) {
      if (e.key === "Escape" && typing(e)) e.target.blur();
      return;
    }
    if (help.open && e.key !== "?") return;
    // Arrows scroll until a row has the focus.
    if (e.key.startsWith("Arrow") && !(document.activeElement && document.activeElement.matches("a[data-row]"))) return;
    if (Object.hasOwn(keys, e.key)) { keys[e.key](); e.preventDefault(); }
  });

  document.addEventListener("submit", (e) => {
    for (const field of e.target.elements) if (field.name && field.value === "") field.disabled = true;
    // Going back shows the form as it was, and its empty fields must work again.
    setTimeout(() => { for (const field of e.target.elements) field.disabled = false; }, 0);
  });

  // Parts marked data-live are replaced when they have changed; what has the focus keeps it.
  async function refresh() {
    let page;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (!answer.ok) return true;
      page = new DOMParser().parseFromString(await answer.text(), "text/html");
    } catch { return true; }
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      if (!fresh || fresh.innerHTML === old.innerHTML) continue;
      const held = old.contains(document.activeElement) ? document.activeElement : null;
      const href = held && held.getAttribute("href");
      const open = new Set([...old.querySelectorAll("details[open][id]")].map((d) => d.id));
      old.innerHTML = fresh.innerHTML;
      for (const id of open) { const d = document.getElementById(id); if (d) d.open = true; }
      if (href) { const again = [...old.querySelectorAll("a")].find((a) => a.getAttribute("href") === href); if (again) again.focus({ preventScroll: true }); }
    }
    document.body.dataset.running = page.body.dataset.running || "";
    return document.body.dataset.running === "yes";
  }
  async function watch() {
    if (document.visibilityState === "hidden" || (await refresh())) setTimeout(watch, 3000);
  }
  if (document.body.dataset.running === "yes" && document.querySelector("[data-live]")) setTimeout(watch, 3000);
})();
