"""The merged model in the forms that other programs open."""
