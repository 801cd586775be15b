#!/bin/sh
# Run by the postgres image when its volume is empty: a database and a role for each service, none of which can read
# another's.
set -eu
secrets=${SECRETS:-/run/secrets}
for name in labelstudio geoprelabel mlflow; do
    psql --set ON_ERROR_STOP=1 --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname postgres \
        --set name="$name" --set password="$(cat "$secrets/${name}_password")" <<'END'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE CONNECT ON DATABASE :"name" FROM PUBLIC;
END
done
