# shellcheck shell=sh
# Source this on machines that others can reach: Dask then talks TLS, and to holders of the key only.
# Without it, whoever reaches a port of a scheduler or a worker can run code as its user.
# The first time it makes a certificate in $DMIXED_TLS, a folder that every host of the cluster reads
# (a shared home folder, or copied there); it is valid for a year, remove the folder to make a new one.
DMIXED_TLS=${DMIXED_TLS:-$HOME/.config/dmixed/tls}
if [ ! -e "$DMIXED_TLS/dask.pem" ]; then
    (umask 077 && mkdir -p "$DMIXED_TLS" &&
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=dask \
            -keyout "$DMIXED_TLS/dask.key" -out "$DMIXED_TLS/dask.pem" 2>/dev/null) || return 1
fi
export DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME=tls
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true
export DASK_DISTRIBUTED__COMM__TLS__CA_FILE="$DMIXED_TLS/dask.pem"
for role in SCHEDULER WORKER CLIENT; do
    export "DASK_DISTRIBUTED__COMM__TLS__${role}__CERT=$DMIXED_TLS/dask.pem"
    export "DASK_DISTRIBUTED__COMM__TLS__${role}__KEY=$DMIXED_TLS/dask.key"
done
unset role
