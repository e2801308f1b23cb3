"""How well a base, an adapter on it or a merged model predicts a text, and how far two of them are apart."""
