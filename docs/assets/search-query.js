// Lets the search box take a pasted error message. By itself Material reads "Error -2" as "without 2", finds
// no sense in "a~b", completes "is" to "isolation", and does not notice what is pasted with the mouse.
{
  const QUERY = 2 // of Material's search worker
  const send = Worker.prototype.postMessage

  // All words but the last, which may not be written to its end yet, are whole: "^1" keeps them so.
  const asWords = text => {
    const words = text.replace(/[-+:^~*"\\]/g, " ").trim().split(/\s+/)
    const last = words.pop()
    const whole = words.length > 0 && last.length < 4
    return [...words.map(word => `${word}^1`), whole ? `${last}^1` : last].join(" ")
  }

  Worker.prototype.postMessage = function (message, ...rest) {
    const query = message.type === QUERY
    return send.call(this, query ? { ...message, data: asWords(message.data) } : message, ...rest)
  }

  const box = document.querySelector("[data-md-component=search-query]")
  box.addEventListener("input", () => box.dispatchEvent(new Event("keyup")))
}
