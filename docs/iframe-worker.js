// The search of this site runs in a worker, which browsers refuse to pages that are opened from a folder.
// There a hidden frame takes its place: the same script, the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inner = (this.inner = frame.contentWindow);
      addEventListener("message", (event) => {
        if (event.source !== inner) return;
        const told = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(told);
        if (this.onmessage) this.onmessage(told);
      });
      this.ready = new Promise((done) => {
        inner.done = done;
      });
      inner.document.open();
      inner.document.write(
        '<script>postMessage = (data) => parent.postMessage(data, "*"); importScripts = () => {}<\/script>' +
          `<script src="${new URL(url, location)}" onload="done()"><\/script>`
      );
      inner.document.close();
      this.frame = frame;
    }
    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
