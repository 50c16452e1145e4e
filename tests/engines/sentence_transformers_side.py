"""Runs in an environment with sentence-transformers and without epmq: reads jobs, prints the embeddings of each."""

from __future__ import annotations

import json
import sys

from sentence_transformers import SentenceTransformer


def main() -> None:
    found = []
    for job in json.loads(sys.stdin.read()):
        model = SentenceTransformer(job["folder"], device="cpu", local_files_only=True)
        embeddings = model.encode(job["texts"], prompt=job["prompt"])
        found.append({"rows": embeddings.tolist(), "same": model.similarity(embeddings, embeddings).tolist()})
    print(json.dumps(found))


main()
