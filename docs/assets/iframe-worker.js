/* Pages that are opened from disk may not start workers, in which the search runs: there, an unseen frame is one. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      inside.document.open(); // else Firefox puts another empty document in its place later
      inside.document.write("<body></body>");
      inside.document.close();
      const post = inside.postMessage.bind(inside);
      this.ready = new Promise((resolve) => {
        const script = inside.document.createElement("script");
        script.src = url;
        script.onload = resolve;
        inside.document.body.appendChild(script);
      });
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.postMessage = (data) => this.ready.then(() => post(data, "*"));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
