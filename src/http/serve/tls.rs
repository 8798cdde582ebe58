//! TLS for the TCP port, by rustls. Tokens authenticate callers; no client certificate is asked for.
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{Error, TlsFiles};
use crate::limits::TLS_HANDSHAKE_MAX;

/// Makes TLS connections of TCP connections.
#[derive(Clone)]
pub(super) struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// Reads the certificate and its key.
    pub(super) fn open(files: &TlsFiles) -> Result<Acceptor, Error> {
        let failed = |path: &Path, detail: String| Error::Tls { path: path.to_owned(), detail };
        let certificates = CertificateDer::pem_file_iter(&files.certificates)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|cause| failed(&files.certificates, cause.to_string()))?;
        if certificates.is_empty() {
            return Err(failed(&files.certificates, "there is no certificate in it".into()));
        }
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|cause| failed(&files.key, cause.to_string()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(certificates, key))
            .map_err(|cause| failed(&files.certificates, cause.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Acceptor(TlsAcceptor::from(Arc::new(config))))
    }

    /// Shakes hands, within a bound.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        tokio::time::timeout(TLS_HANDSHAKE_MAX, self.0.accept(stream)).await?
    }
}
