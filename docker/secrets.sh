#!/bin/sh
# Makes the passwords that docker-compose.yml hands to its services as files: sh docker/secrets.sh [FOLDER]
# Those that are there stay. The folder is closed to others; the files in it can be read by any user, because the
# services run as users of their own and compose mounts files as they are.
set -eu
folder=${1:-secrets}
umask 077
mkdir -p "$folder"
chmod 700 "$folder"

# At most 40 characters: Label Studio's tokens have no more.
for name in postgres_password labelstudio_password geoprelabel_password mlflow_password label_studio_login \
    label_studio_api_key webhook_secret basic_auth_pass minio_password; do
    [ -s "$folder/$name" ] || od -An -N20 -tx1 /dev/urandom | tr -d ' \n' >"$folder/$name"
done

value() { cat "$folder/$1"; }
# What is put together from them is written anew each time. Label Studio reads no secrets from files, but its entry point
# runs what ENV_INJECT_SOURCES names.
rm -f "$folder/label_studio.env" "$folder/backend_database_url" "$folder/mlflow_database_url" "$folder/s3_credentials"
cat >"$folder/label_studio.env" <<END
export POSTGRE_PASSWORD=$(value labelstudio_password)
export LABEL_STUDIO_PASSWORD=$(value label_studio_login)
export LABEL_STUDIO_USER_TOKEN=$(value label_studio_api_key)
END
printf 'postgresql://geoprelabel:%s@database:5432/geoprelabel' "$(value geoprelabel_password)" >"$folder/backend_database_url"
printf 'postgresql+psycopg://mlflow:%s@database:5432/mlflow' "$(value mlflow_password)" >"$folder/mlflow_database_url"
printf '[default]\naws_access_key_id = mlflow\naws_secret_access_key = %s\n' "$(value minio_password)" >"$folder/s3_credentials"
chmod 444 "$folder"/*
echo "Label Studio's first password is in $folder/label_studio_login"
