//! Where an answer's ids lead: the links of OpenAPI, which tools follow from one request to the next.
use serde_json::{Map, Value, json};

/// What a resource's id can be used for.
const OF_SERVER: &[&str] = &[
    "read_server",
    "update_server",
    "delete_server",
    "start_server",
    "stop_server",
    "reboot_server",
    "pause_server",
    "resume_server",
    "hibernate_server",
    "settle_memory_server",
    "upgrade_vmm_server",
    "snapshot_server",
    "clone_server",
    "migrate_server",
    "restore_server",
    "limit_server_migration",
    "settle_server_migration",
    "read_server_isolation",
    "read_server_metrics",
    "read_console_log",
    "create_console_token",
    "list_console_readers",
    "kick_console_readers",
];
const OF_IMAGE: &[&str] = &["read_image", "update_image", "delete_image"];
const OF_VOLUME: &[&str] = &["read_volume", "update_volume", "delete_volume"];
const OF_SNAPSHOT: &[&str] = &["read_snapshot", "update_snapshot", "delete_snapshot", "clone_snapshot"];
const OF_NETWORK: &[&str] = &["read_network", "update_network", "delete_network"];
const OF_OPERATION: &[&str] = &["read_operation", "cancel_operation"];

/// The links of a successful response of this operation.
pub(super) fn of(operation: &str, status: &str) -> Option<Value> {
    let (targets, id) = match operation {
        "create_server" if status != "200" => (OF_SERVER, "/resource/id"),
        "import_image" if status != "200" => (OF_IMAGE, "/resource/id"),
        "create_network" if status != "200" => (OF_NETWORK, "/resource/id"),
        "snapshot_server" => (OF_SNAPSHOT, "/resource/id"),
        "list_snapshots" => (OF_SNAPSHOT, "/items/0/id"),
        "list_servers" => (OF_SERVER, "/items/0/id"),
        "list_images" => (OF_IMAGE, "/items/0/id"),
        "list_volumes" => (OF_VOLUME, "/items/0/id"),
        "list_networks" => (OF_NETWORK, "/items/0/id"),
        "list_operations" => (OF_OPERATION, "/items/0/id"),
        _ => return accepted(operation, status),
    };
    let mut links = Map::new();
    add(&mut links, targets, id);
    if status == "202" {
        add(&mut links, OF_OPERATION, "/operation/id");
    }
    Some(Value::Object(links))
}

/// What else answers 202 leads to its operation.
fn accepted(operation: &str, status: &str) -> Option<Value> {
    let mut links = Map::new();
    let is_bulk = operation.ends_with("_servers");
    add(&mut links, OF_OPERATION, if is_bulk { "/items/0/operation/id" } else { "/operation/id" });
    (status == "202").then_some(Value::Object(links))
}

fn add(links: &mut Map<String, Value>, targets: &[&str], id: &str) {
    for target in targets {
        let parameters = json!({ "id": format!("$response.body#{id}") });
        links.insert((*target).to_owned(), json!({ "operationId": target, "parameters": parameters }));
    }
}
