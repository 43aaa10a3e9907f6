// The site's search runs in a Worker, which browsers do not start for a page opened from disk. There
// a hidden frame takes its place: its script sees postMessage and importScripts as in a Worker.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const load = url =>
        new Promise((loaded, failed) => {
          const script = inside.document.createElement("script")
          script.onload = loaded
          script.onerror = failed
          script.src = url
          inside.document.body.append(script)
        })
      inside.importScripts = (...urls) =>
        urls.reduce((before, url) => before.then(() => load(url)), Promise.resolve())
      this.frame = frame
      this.ready = load(new URL(url, location.href).href)
    }

    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      )
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.IFrameWorker = window.Worker = IFrameWorker
}
