//! The OpenAPI document and the list of error codes, both made from the types. What holds for every path (its
//! problems, its headers) is added here, so that no handler repeats it and none can forget it.
mod links;
pub(crate) mod operation;
mod shape;

use model::{Code, Problem};
use serde_json::Value;
use utoipa::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};

use crate::error::DOCUMENTATION;

/// What the document says before any path.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Toft",
        version = "1",
        description = "Carves one physical machine into isolated virtual servers. Conventions are in api/README.md.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "servers", description = "What a customer creates."),
        (name = "images", description = "Read-only templates that root volumes are made from."),
        (name = "volumes", description = "Writable disks."),
        (name = "snapshots", description = "What servers were at a moment."),
        (name = "networks", description = "Layer 2 with addresses."),
        (name = "operations", description = "Long jobs with progress and an end."),
        (name = "events", description = "One ordered log of everything that happens."),
        (name = "host", description = "The physical computer and the daemon that keeps it."),
    ),
    components(schemas(Problem)),
    security(("token" = [])),
)]
struct Base;

/// The document before the paths are added.
pub(crate) fn base() -> utoipa::openapi::OpenApi {
    let mut document = Base::openapi();
    let token = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some(
            "A token made by `toftd token create`. The Unix socket needs none: it trusts its peer's user.",
        ))
        .build();
    document
        .components
        .get_or_insert_default()
        .security_schemes
        .insert("token".to_owned(), SecurityScheme::Http(token).into());
    document
}

/// The whole document as it is served and kept in `api/openapi.json`.
pub(crate) fn openapi_json() -> String {
    let described = serde_json::to_value(crate::routes::described()).unwrap_or_default();
    let mut text = serde_json::to_string_pretty(&finished(described)).unwrap_or_default();
    text.push('\n');
    text
}

const METHODS: &[&str] = &["get", "post", "patch", "delete"];
/// Merge patches, whose members null may only remove where there is something to go back to.
const PATCHES: &[&str] = &["PatchServer", "PatchImage", "PatchVolume", "PatchSnapshot", "PatchNetwork"];

fn finished(mut document: Value) -> Value {
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for method in METHODS {
            if let Some(described) = item.get_mut(*method) {
                operation::finish(path, method, described);
            }
        }
        shape::bound_integers(item);
    }
    let components = &mut document["components"];
    shape::bound(&mut components["schemas"]);
    for (name, schema) in components["schemas"].as_object_mut().into_iter().flatten() {
        shape::refer(name, schema);
        shape::close_unions(schema);
        if PATCHES.contains(&name.as_str()) {
            shape::forbid_nulls(schema, &crate::handlers::removable(name));
        }
        shape::bound_integers(schema);
    }
    components["responses"] = operation::problems();
    document
}

/// Where the bounds are put, for the test that finds those without a place.
#[cfg(test)]
pub(crate) fn bounds() -> Vec<(&'static str, Value)> {
    shape::bounds()
}

/// The error codes as Markdown, as served at [`DOCUMENTATION`] and kept in `api/errors.md`.
pub(crate) fn errors_markdown() -> String {
    let mut text = format!(
        "# Error codes\n\n\
         Every error is a problem document (RFC 9457, `application/problem+json`). Its `code` is one of these, its \
         `type` is `{DOCUMENTATION}#<code>`. *Again* says whether the same request may work later.\n"
    );
    for code in Code::ALL {
        let again = if code.retryable() { "yes" } else { "no" };
        text.push_str(&format!(
            "\n## {}\n\n{} {}. Again: {again}.\n\n{}\n",
            code.as_str(),
            code.status(),
            code.title(),
            code.meaning().trim(),
        ));
    }
    text
}
