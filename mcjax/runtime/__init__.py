"""The loop: ingest, focus, decode; the public MegaContext."""
