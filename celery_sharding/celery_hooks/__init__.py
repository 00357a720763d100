"""Every place where Celery, kombu or billiard is bent: `table` lists them, `installer` puts them in.

What a hook calls of ours stands below this package, or is handed to it behind a narrow protocol (`site`).
"""
