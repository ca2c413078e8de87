"""What every room uses: files, the terminal, tables, names, processes, charts."""
