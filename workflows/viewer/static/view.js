"use strict";
// All of it is comfort: without this file pages, filters and votes work by links and forms.

const byId = (id) => document.getElementById(id);
const typing = (target) => target.closest("input:not([type=range]), textarea, select") !== null;
const follow = (id) => { const link = byId(id); if (link) link.click(); return link !== null; };

// Keys of all pages
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typing(event.target)) { event.target.blur(); return; }
  if (typing(event.target)) return;
  const slides = event.target.id === "slide";
  const key = event.key;
  let done = false;
  if (key === "/" && byId("q")) {
    const more = byId("more");
    if (more && getComputedStyle(byId("q").closest(".side")).display === "none") more.checked = true;
    byId("q").focus(); byId("q").select(); done = true;
  }
  else if (key === "n" || (key === "ArrowRight" && document.body.className === "one" && !slides)) done = follow("next");
  else if (key === "p" || (key === "ArrowLeft" && document.body.className === "one" && !slides)) done = follow("previous");
  else if (key === "Escape") done = follow("back");
  else if (key.startsWith("Arrow") && byId("tiles")) done = move(key);
  if (done) event.preventDefault();
});

// The grid: arrows go from tile to tile.
function move(key) {
  const links = [...document.querySelectorAll("#tiles a")];
  if (!links.length) return false;
  const at = links.indexOf(document.activeElement);
  if (at < 0) { links[0].focus(); return true; }
  const columns = getComputedStyle(byId("tiles")).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[key];
  const to = links[at + step];
  if (to) to.focus();
  return Boolean(to);
}

// A run at work: its line is asked for every three seconds, and new rows are put in on the first page.
const live = byId("live");
if (live) {
  let known = live.dataset;
  let version = null;
  const swap = async () => {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const next = new DOMParser().parseFromString(await answer.text(), "text/html");
    const mark = document.activeElement.closest && document.activeElement.closest("li[data-mark]");
    const old = new Map([...document.querySelectorAll("#tiles li")].map((li) => [li.dataset.mark, li]));
    const tiles = next.getElementById("tiles");
    for (const li of [...tiles.children]) {
      // What is there already stays, so that no picture is loaded or drawn twice.
      const same = old.get(li.dataset.mark);
      if (same && same.outerHTML === li.outerHTML) li.replaceWith(same);
    }
    byId("tiles").replaceChildren(...tiles.children);
    byId("count").replaceWith(next.getElementById("count"));
    byId("facets").replaceWith(next.getElementById("facets"));
    const pages = document.querySelector(".pages"), fresh = next.querySelector(".pages");
    if (pages) pages.remove();
    if (fresh) byId("main").append(fresh);
    if (mark) { const again = document.querySelector(`li[data-mark="${mark.dataset.mark}"] a`); if (again) again.focus(); }
  };
  const look = async () => {
    try {
      const answer = await fetch(known.url, { headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error(String(answer.status));
      const state = await answer.json();
      live.innerHTML = state.html;
      const news = String(state.shards) !== known.shards || (known.complete === "no" && state.complete)
        || (known.plain === "no" && version !== null && state.version !== version);
      const first = known.first === "yes" && (byId("tiles").childElementCount < 12 || window.scrollY < 200);
      if (news && (first || (known.complete === "no" && state.complete && known.first === "yes"))) {
        known.shards = String(state.shards);
        known.complete = state.complete ? "yes" : "no";
        await swap();
      }
      version = state.version;
      setTimeout(look, state.running || !state.complete ? 3000 : 30000);
    } catch { setTimeout(look, 10000); }
  };
  setTimeout(look, known.running === "yes" || known.complete === "no" ? 2000 : 30000);
}

// An edit: the source under the result, as much of each as the slider says.
const slider = byId("slider");
if (slider) {
  const slide = byId("slide");
  const set = () => slider.style.setProperty("--at", `${slide.value}%`);
  const size = () => {
    const result = slider.querySelector(".after img");
    if (result.naturalWidth) slider.style.setProperty("--ratio", `${result.naturalWidth} / ${result.naturalHeight}`);
  };
  slider.classList.add("on");
  slide.hidden = false;
  slide.addEventListener("input", set);
  slider.querySelector(".after img").addEventListener("load", size);
  size(); set();
}

for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(byId(button.dataset.from).textContent);
    button.textContent = "Copied";
  });
}

if (byId("waiting")) setTimeout(() => location.reload(), 1500);

// A comparison: a key is a vote on the row in focus, and the next row comes.
const pairs = [...document.querySelectorAll("form.pair")];
if (pairs.length) {
  document.querySelector(".keys").hidden = false;
  const current = () => pairs.find((pair) => pair.contains(document.activeElement)) || null;
  const go = (pair) => { if (pair) { pair.focus({ preventScroll: true }); pair.scrollIntoView({ block: "center" }); } };
  const vote = async (pair, choice) => {
    const data = new URLSearchParams(new FormData(pair));
    data.set("choice", choice);
    const answer = await fetch("/votes", { method: "POST", body: data, headers: { Accept: "application/json" } });
    if (!answer.ok) { pair.querySelector(".facts").append(" · the vote was not kept"); return false; }
    byId("summary").innerHTML = (await answer.json()).html;
    for (const button of pair.querySelectorAll("button[aria-pressed]"))
      button.setAttribute("aria-pressed", String(button.value === choice));
    for (const figure of pair.querySelectorAll("figure"))
      figure.classList.toggle("won", figure.querySelector("button").value === choice);
    return true;
  };
  for (const pair of pairs)
    pair.addEventListener("submit", (event) => {
      event.preventDefault();
      vote(pair, event.submitter ? event.submitter.value : "none");
    });
  document.addEventListener("keydown", async (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const at = current();
    const key = event.key.toLowerCase();
    if (key === "arrowdown" || key === "arrowup") {
      event.preventDefault();
      go(at ? pairs[pairs.indexOf(at) + (key === "arrowdown" ? 1 : -1)] : pairs[0]);
      return;
    }
    const pair = at || pairs[0];
    const choice = { t: "tie", x: "bad", u: "none" }[key] || (pair.querySelector(`button[value="${CSS.escape(key)}"]`) ? key : null);
    if (!choice || key.length !== 1) return;
    event.preventDefault();
    if (await vote(pair, choice) && choice !== "none") go(pairs[pairs.indexOf(pair) + 1] || pair);
  });
  if (!location.hash) pairs[0].focus({ preventScroll: true });
}
