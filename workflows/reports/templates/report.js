"use strict";
{
  const PAGE = 60;
  const box = document.getElementById("filter");
  const pages = document.querySelector(".pages");
  const cards = [...document.querySelectorAll(".card")];
  const plain = text => text.toLowerCase().replaceAll("×", "x");
  const words = cards.map(card => plain(card.textContent));
  let page = 0;
  const show = () => {
    const wanted = plain(box.value).split(/\s+/).filter(Boolean);
    const found = cards.filter((card, n) => wanted.every(word => words[n].includes(word)));
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const shown = new Set(found.slice(page * PAGE, (page + 1) * PAGE));
    for (const card of cards) card.hidden = !shown.has(card);
    document.getElementById("count").textContent = found.length;
    document.getElementById("page").textContent = `${page + 1} of ${last + 1}`;
    document.getElementById("back").disabled = page === 0;
    document.getElementById("on").disabled = page === last;
    pages.hidden = last === 0;
  };
  const turn = pagesOn => { page += pagesOn; show(); box.scrollIntoView(); };
  if (box) {
    box.parentElement.hidden = false;
    box.addEventListener("input", () => { page = 0; show(); });
    document.getElementById("back").addEventListener("click", () => turn(-1));
    document.getElementById("on").addEventListener("click", () => turn(1));
    show();
  }

  const view = document.getElementById("view");
  for (const card of cards) {
    card.querySelector("button").addEventListener("click", () => {
      const images = document.createElement("div");
      images.className = "images";
      images.append(...[...card.querySelectorAll("img, .broken")].map(part => part.cloneNode(true)));
      view.classList.toggle("pairs", images.childElementCount > 1);
      const texts = [...card.querySelectorAll("p")].map(part => part.cloneNode(true));
      document.getElementById("large").replaceChildren(images, ...texts);
      view.showModal();
    });
  }
  view.addEventListener("click", event => { if (event.target === view) view.close(); });
}
