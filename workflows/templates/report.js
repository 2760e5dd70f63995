"use strict";
{
  const box = document.getElementById("filter");
  const cards = [...document.querySelectorAll(".card")];
  const plain = text => text.toLowerCase().replaceAll("×", "x");
  const words = cards.map(card => plain(card.textContent));
  const filter = () => {
    const wanted = plain(box.value).split(/\s+/).filter(Boolean);
    cards.forEach((card, n) => { card.hidden = !wanted.every(word => words[n].includes(word)); });
    document.getElementById("count").textContent = cards.filter(card => !card.hidden).length;
  };
  if (box) {
    box.parentElement.hidden = false;
    box.addEventListener("input", filter);
  }

  const view = document.getElementById("view");
  for (const card of cards) {
    card.querySelector("button").addEventListener("click", () => {
      const parts = [...card.querySelectorAll("img, p")].map(part => part.cloneNode(true));
      document.getElementById("large").replaceChildren(...parts);
      view.showModal();
    });
  }
  view.addEventListener("click", event => { if (event.target === view) view.close(); });
}
