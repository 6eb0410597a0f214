"""What a browser shows of modiff. `app` and `serve` need Gradio (`pip install 'modiff[web]'`), the others do not."""
