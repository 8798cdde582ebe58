//! What is generated from the types and kept in `api/`. `UPDATE=1 cargo test -p http-room` writes it anew.
use std::path::{Path, PathBuf};

use model::console::CreateConsoleToken;
use model::image::{ImportImage, PatchImage};
use model::migration::{CreateMigrationTicket, LimitMigration, MigrateServer, SettleMigration};
use model::network::{CreateNetwork, PatchNetwork};
use model::server::{CreateServer, PatchServer, StopServer};
use model::snapshot::{CreateClones, CreateSnapshot, PatchSnapshot, RestoreServer};
use model::volume::PatchVolume;

use crate::document;

fn api_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../api")
}

fn assert_kept(name: &str, generated: &str) {
    let path = api_directory().join(name);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, generated).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == generated,
        "api/{name} differs from the types: UPDATE=1 cargo test -p http-room, then review it"
    );
}

#[test]
fn openapi_document_in_api_is_that_of_the_types() {
    assert_kept("openapi.json", &document::openapi_json());
}

#[test]
fn errors_page_in_api_is_that_of_the_codes() {
    assert_kept("errors.md", &document::errors_markdown());
}

#[test]
fn every_example_parses_as_its_type_and_is_in_the_document() {
    fn check<T: serde::de::DeserializeOwned>(text: &str) -> Result<(), String> {
        serde_json::from_str::<T>(text).map(drop).map_err(|cause| cause.to_string())
    }
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(api_directory().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let parsed = match name.as_str() {
            "create-server.json" => check::<CreateServer>(&text),
            "update-server.json" => check::<PatchServer>(&text),
            "stop-server.json" => check::<StopServer>(&text),
            "create-console-token.json" => check::<CreateConsoleToken>(&text),
            "limit-migration.json" => check::<LimitMigration>(&text),
            "settle-migration.json" => check::<SettleMigration>(&text),
            "migrate-server.json" => check::<MigrateServer>(&text),
            "create-migration-ticket.json" => check::<CreateMigrationTicket>(&text),
            "import-image.json" => check::<ImportImage>(&text),
            "update-image.json" => check::<PatchImage>(&text),
            "update-volume.json" => check::<PatchVolume>(&text),
            "snapshot-server.json" => check::<CreateSnapshot>(&text),
            "restore-server.json" => check::<RestoreServer>(&text),
            "clone-snapshot.json" | "clone-server.json" => check::<CreateClones>(&text),
            "update-snapshot.json" => check::<PatchSnapshot>(&text),
            "create-network.json" => check::<CreateNetwork>(&text),
            "update-network.json" => check::<PatchNetwork>(&text),
            _ => Err("say here which type it is an example of".into()),
        };
        assert_eq!(parsed, Ok(()), "{name}");
        assert!(
            document::operation::EXAMPLES.iter().any(|(_, _, known)| *known == text),
            "{name} is in no operation"
        );
        seen.push(name);
    }
    assert_eq!(seen.len(), document::operation::EXAMPLES.len(), "{seen:?}");
}

#[test]
fn every_bound_has_its_place_in_the_document() {
    let described = serde_json::to_value(crate::routes::described()).unwrap();
    for (pointer, _) in document::bounds() {
        assert!(
            described["components"]["schemas"].pointer(pointer).is_some(),
            "{pointer} is no place of a schema"
        );
    }
}

#[test]
fn every_reference_in_the_document_leads_somewhere() {
    fn references(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(members) => {
                found.extend(members.get("$ref").and_then(|r| r.as_str()).map(str::to_owned));
                members.values().for_each(|value| references(value, found));
            }
            serde_json::Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document: serde_json::Value = serde_json::from_str(&document::openapi_json()).unwrap();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 100, "only {} references", found.len());
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

#[test]
fn every_link_names_an_operation() {
    let document: serde_json::Value = serde_json::from_str(&document::openapi_json()).unwrap();
    let operations: Vec<&serde_json::Value> = document["paths"]
        .as_object()
        .unwrap()
        .values()
        .flat_map(|item| item.as_object().unwrap().values())
        .collect();
    let known: Vec<&str> =
        operations.iter().map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let mut links = 0;
    for response in
        operations.iter().flat_map(|operation| operation["responses"].as_object().unwrap().values())
    {
        for link in response["links"].as_object().into_iter().flat_map(|links| links.values()) {
            let target = link["operationId"].as_str().unwrap();
            assert!(known.contains(&target), "{target} is no operation");
            links += 1;
        }
    }
    assert!(links > 50, "only {links} links");
}

#[test]
fn every_request_body_refuses_unknown_members() {
    let document: serde_json::Value = serde_json::from_str(&document::openapi_json()).unwrap();
    let mut bodies = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for operation in item.as_object().unwrap().values() {
            let Some(schema) =
                operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str()
            else {
                continue;
            };
            let schema = document.pointer(schema.strip_prefix('#').unwrap()).unwrap();
            assert_eq!(schema["additionalProperties"], false, "{path}: {schema}");
            bodies += 1;
        }
    }
    assert!(bodies >= 12, "only {bodies} bodies");
}
