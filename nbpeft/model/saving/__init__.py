"""Between adapters in memory and files on disk: what is saved, what is loaded, what is merged into a copy.

Door: ``files`` (load and save adapters), ``merge_export`` (a merged model on disk).
"""
