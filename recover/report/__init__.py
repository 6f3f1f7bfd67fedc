"""What a run found, as JSON, markdown and one HTML page: `collect` reads, `render` writes; `compare` is for several."""
