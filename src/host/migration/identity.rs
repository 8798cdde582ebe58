//! Who this host is to other hosts: a key and a certificate of its own, made once and kept in the records. Nobody
//! signs it; others know it by its fingerprint, which comes with a ticket. `mod` makes connections with it.
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rusqlite::OptionalExtension;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use wire::saved::Digest;

use crate::error::{Error, Result};
use crate::store::Tx;

/// Key in the table `host` under which the identity is kept.
const IDENTITY: &str = "identity";

/// The name in every host's certificate. Nobody looks at it: hosts are told apart by fingerprint.
const NAME: &str = "host.toft.internal";

/// A key and its certificate.
#[derive(Clone)]
pub(super) struct Identity {
    certificate: CertificateDer<'static>,
    key: Arc<PrivateKeyDer<'static>>,
    provider: Arc<CryptoProvider>,
}

/// As it is kept, in base64 of DER.
#[derive(Serialize, Deserialize)]
struct Kept {
    certificate: String,
    key: String,
}

impl Identity {
    /// Reads the identity, or makes it the first time.
    pub(super) fn of_host(tx: &Tx<'_>) -> Result<Identity> {
        let kept: Option<String> =
            tx.query_row("SELECT value FROM host WHERE key = ?1", [IDENTITY], |row| row.get(0)).optional()?;
        let kept: Kept = match kept {
            Some(text) => serde_json::from_str(&text)?,
            None => {
                let kept = make()?;
                let text = serde_json::to_string(&kept)?;
                tx.execute("INSERT INTO host (key, value) VALUES (?1, ?2)", [IDENTITY, &text])?;
                kept
            }
        };
        let decode = |text: &str| {
            STANDARD
                .decode(text)
                .map_err(|cause| Error::internal("the host's own certificate cannot be read", cause))
        };
        Ok(Identity {
            certificate: CertificateDer::from(decode(&kept.certificate)?),
            key: Arc::new(PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(decode(&kept.key)?))),
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        })
    }

    /// What other hosts know this one by.
    pub(super) fn fingerprint(&self) -> Digest {
        fingerprint(&self.certificate)
    }

    /// For a connection to the host of this fingerprint and no other.
    pub(super) fn to(&self, peer: Digest) -> Result<ClientConfig> {
        ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Peer {
                wanted: Some(peer),
                provider: self.provider.clone(),
            }))
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(unusable)
    }

    /// For connections from hosts that show who they are; whether they may come is for their tickets to say.
    pub(super) fn as_target(&self) -> Result<ServerConfig> {
        ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(Arc::new(Peer { wanted: None, provider: self.provider.clone() }))
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(unusable)
    }
}

/// What a host is known by.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> Digest {
    Digest(Sha256::digest(certificate).into())
}

fn make() -> Result<Kept> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])
        .map_err(|cause| Error::internal("the host's own certificate cannot be made", cause))?;
    Ok(Kept {
        certificate: STANDARD.encode(made.cert.der()),
        key: STANDARD.encode(made.signing_key.serialize_der()),
    })
}

fn unusable(cause: rustls::Error) -> Error {
    Error::internal("the host's own certificate cannot be used", cause)
}

/// Judges the certificate that the other side shows: by its fingerprint, or not at all. That the other side has its
/// key is checked either way.
#[derive(Debug)]
struct Peer {
    wanted: Option<Digest>,
    provider: Arc<CryptoProvider>,
}

impl Peer {
    fn judge(&self, certificate: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        match self.wanted {
            Some(wanted) if wanted != fingerprint(certificate) => {
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
            _ => Ok(()),
        }
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    /// TLS 1.2 is not offered, so this is never asked.
    fn too_old() -> rustls::Error {
        rustls::Error::General("TLS 1.2 is not spoken".to_owned())
    }
}

impl ServerCertVerifier for Peer {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.judge(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(Peer::too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Peer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.judge(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(Peer::too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What the other side of a connection showed. Fails when it showed nothing, which the handshake rules out.
pub(super) fn shown(certificates: Option<&[CertificateDer<'_>]>) -> Result<Digest> {
    certificates
        .and_then(<[_]>::first)
        .map(fingerprint)
        .ok_or_else(|| Error::new(model::Code::Unauthenticated, "the other host showed no certificate"))
}
