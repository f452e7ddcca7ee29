"""What is looked at: drawings, HTML pages, files of codes, the pixel decoder."""
